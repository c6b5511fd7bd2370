"""``python -m torchstage``: see what staging does on real rows (``demo``) and to a model of your own (``explain``)."""

import argparse

from torchstage._demo import run_demo
from torchstage._explain import _command


def main() -> None:
    """Parse the command line and run the command."""
    parser = argparse.ArgumentParser(prog="python -m torchstage", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="train a click model on UCI Adult, plain and staged",
        description="Train plain and staged; compare.",
    )
    demo.add_argument("--epochs", type=int, default=6, help="epochs of each (default: %(default)s)")
    demo.add_argument("--batch-size", type=int, default=1024, help="rows in a step (default: %(default)s)")
    demo.add_argument("--threads", type=int, default=1, help="num_threads of the stage (default: %(default)s)")
    demo.add_argument("--capacity", type=int, default=4, help="capacity of the buffer (default: %(default)s)")
    demo.set_defaults(run=lambda args: print(run_demo(args.epochs, args.batch_size, args.threads, args.capacity)))
    _command.add_command(commands)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
