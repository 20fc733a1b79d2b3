"""``python -m resnet_backbone.cli COMMAND``, for processes that start a command."""

from resnet_backbone.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
