"""`python -m mla_compile demo`, `python -m mla_compile explain script.py`, `... selftest`."""

import argparse
from importlib.util import find_spec
from pathlib import Path


def demo(parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    if find_spec("transformers") is None:
        raise SystemExit("the demo needs transformers: pip install -e '.[demo]'")
    from mla_compile.demo import __doc__ as description
    from mla_compile.demo import add_arguments, main

    parser.description = description
    add_arguments(parser)
    return main(parser.parse_args(arguments))


def explain(parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    from mla_compile.report import reporting, run_script

    parser.description = "Run a script with the pass in all that it compiles, and report."
    parser.add_argument("--save", metavar="REPORT.html", help="also write a page with pictures")
    parser.add_argument("script", help="as given to python")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    args = parser.parse_args(arguments)
    if not Path(args.script).is_file():
        parser.error(f"there is no script {args.script}")
    save = args.save and Path(args.save).resolve()  # the script may change the folder
    if save and (save.is_dir() or not save.parent.is_dir()):
        parser.error(f"expected --save to name a file in a folder that exists, got {save}")
    try:
        with reporting() as report:
            run_script(args.script, args.arguments)
    finally:  # what was seen up to an error or exit is worth telling, too
        print(report)
        if save:
            report.save(save)
    return 0


def selftest(parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    from mla_compile.selftest import __doc__ as description
    from mla_compile.selftest import add_arguments, main

    parser.description = description
    add_arguments(parser)
    return main(parser.parse_args(arguments))


COMMANDS = {"demo": demo, "explain": explain, "selftest": selftest}


def main() -> int:
    program = "python -m mla_compile"
    parser = argparse.ArgumentParser(prog=program)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    command = argparse.ArgumentParser(prog=f"{program} {args.command}")
    return COMMANDS[args.command](command, args.arguments)


if __name__ == "__main__":
    raise SystemExit(main())
