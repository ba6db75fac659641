"""`python -m onnx_lathe`: the `optimize` program."""

from onnx_lathe._cli import main

if __name__ == "__main__":
    main()
