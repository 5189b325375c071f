"""`python -m mla_compile demo`: see mla_compile/demo.py."""

import argparse
from importlib.util import find_spec


def main() -> int:
    if find_spec("transformers") is None:
        raise SystemExit("the demo needs transformers: pip install -e '.[demo]'")
    from mla_compile.demo import __doc__ as description
    from mla_compile.demo import add_arguments
    from mla_compile.demo import main as run

    parser = argparse.ArgumentParser(prog="python -m mla_compile")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("demo", description=description)
    add_arguments(command)
    command.set_defaults(run=run)
    args = parser.parse_args()
    result: int = args.run(args)
    return result


if __name__ == "__main__":
    raise SystemExit(main())
