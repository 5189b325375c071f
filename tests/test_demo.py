"""`python -m mla_compile demo` at a size that compiles quickly."""

import subprocess
import sys
from pathlib import Path

SMALL = {"device": "cpu", "batch": 2, "context": 96, "tokens": 3, "heads": 2, "hidden": 128}


def test_the_demo_rewrites_both_layers_and_decodes_the_same_tokens() -> None:
    command = [sys.executable, "-m", "mla_compile", "demo"]
    command += [f"--{name}={value}" for name, value in SMALL.items()]
    root = Path(__file__).parent.parent
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "attention sites rewritten                         2 of 2" in result.stdout
