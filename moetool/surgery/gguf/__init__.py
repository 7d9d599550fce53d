"""What llama.cpp calls things: names of tensors, fields of the config, the tokenizer, by family.
The data is archs/gguf.json; how a file lies is containers/gguf.py.
"""
