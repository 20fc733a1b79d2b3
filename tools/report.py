#!/usr/bin/env python
"""Make pictures and tables of results from what training runs leave."""

from resnet_backbone.cli.report import main

if __name__ == "__main__":
    raise SystemExit(main())
