"""The compiler pass: from an ATen graph to an MLASite, and from an MLASite to the op."""

if __name__ != "mla_compile.passes":
    raise ImportError("import mla_compile.passes, not passes")
