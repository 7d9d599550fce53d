"""Pure functions: tensors and numbers in, tensors out. No files, no names of methods or families."""
