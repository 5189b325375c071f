"""`python -m mla_compile demo`: see mla_compile/demo.py."""

import argparse
from importlib.util import find_spec


def main() -> int:
    if find_spec("transformers") is None:
        raise SystemExit("the demo needs transformers: pip install -e '.[demo]'")
    from mla_compile import demo

    parser = argparse.ArgumentParser(prog="python -m mla_compile")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("demo", description=demo.__doc__)
    demo.add_arguments(command)
    command.set_defaults(run=demo.main)
    args = parser.parse_args()
    result: int = args.run(args)
    return result


if __name__ == "__main__":
    raise SystemExit(main())
