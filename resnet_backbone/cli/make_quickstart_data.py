#!/usr/bin/env python
"""Write the built-in detection set (handwritten digits on photographs) in PASCAL VOC layout.

    python tools/make_quickstart_data.py --output output/quickstart/data

Takes a few seconds and no network. A folder that already holds the same set is left as it is.
"""

import argparse
import sys

from tqdm import tqdm

from resnet_backbone.detection.data import quickstart


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to create")
    parser.add_argument("--num-train", type=int, default=600, help="training pictures (600)")
    parser.add_argument("--num-test", type=int, default=150, help="test pictures (150)")
    parser.add_argument("--image-size", type=int, default=160, help="side in pixels (160)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another set (0)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a set made with other settings"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Generate the set, or say that it is there; return the exit status."""
    arguments = parse_arguments(argv)
    settings = {key: getattr(arguments, key) for key in ("num_train", "num_test", "image_size")}
    settings["seed"] = arguments.seed
    if quickstart.is_complete(arguments.output, settings):
        print(f"{arguments.output}: complete already, nothing to do")
        return 0
    try:
        with tqdm(
            total=arguments.num_train + arguments.num_test, unit="picture", disable=None
        ) as bar:
            quickstart.generate(
                arguments.output, **settings, overwrite=arguments.overwrite, on_image=bar.update
            )
    except (ValueError, OSError, ImportError) as error:
        print(f"make_quickstart_data: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.output}: {arguments.num_train} train and {arguments.num_test} test pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
