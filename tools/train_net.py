#!/usr/bin/env python
from resnet_backbone.cli.train_net import main

if __name__ == "__main__":
    raise SystemExit(main())
