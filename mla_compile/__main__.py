"""`python -m mla_compile demo` and `selftest`: see the modules of these names."""

import argparse
import sys
from importlib.util import find_spec

from mla_compile import selftest


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mla_compile")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("selftest", description=selftest.__doc__)
    selftest.add_arguments(command)
    command.set_defaults(run=selftest.main)
    if find_spec("transformers") is not None:
        from mla_compile import demo

        command = commands.add_parser("demo", description=demo.__doc__)
        demo.add_arguments(command)
        command.set_defaults(run=demo.main)
    elif "demo" in sys.argv[1:2]:
        raise SystemExit("the demo needs transformers: pip install -e '.[demo]'")
    args = parser.parse_args()
    result: int = args.run(args)
    return result


if __name__ == "__main__":
    raise SystemExit(main())
