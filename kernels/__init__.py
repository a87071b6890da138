"""Triton kernels, imported as `personvit.kernels` and only through `personvit.ops`."""

if __name__ == "kernels":
    # Another project's package may be called `kernels`; ours registers operators and must exist once.
    raise ImportError("import personvit.kernels, not kernels: this folder belongs to the personvit package")
