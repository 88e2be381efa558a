"""Hugging Face folder -> GGUF file: names, metadata, vocabulary, block formats.

The container is written by the official `gguf` package and the blocks by llama.cpp's row kernels, as the wheels of
xllamacpp and libgguf have them, so no compiler is needed. Names, metadata, vocabulary and the type rules of each mix
follow llama.cpp of autumn 2026 (the conversion scripts and `src/llama-quant.cpp`, releases around b11500).

    write_gguf(model_dir, out_file, "Q4_K_M")     in writer.py: the whole way
    mixes.py, roles.py, overrides.py              which tensor gets which type
    imatrix.py, activations.py                    the importance matrix that blocks are fitted to
    model.py                                      a model before a mix: names, values and keys
    architectures.py                              which models, and how their tensors differ
    converter/                                    llama.cpp's own converter, for all other models
    metadata.py                                   hyper-parameters and general.* keys
    vocabulary.py, pre_tokenizers.py              tokenizer, special ids, stop tokens, chat template
    tensors.py, blocks.py, row_kernels.py         names, row order, quantization on all cores
    container.py, shards.py                       the file itself, and one model in several files
    checks.py, budget.py                          what it asks of a model, and types that a budget of bits may choose
    llama_cpp.py, llama_library.py, llama_server.py   a file as llama.cpp reads it
    token_parity.py, stops.py, keys.py          whether llama.cpp and Ollama see the tokens that were trained
    modelfile.py, ollama_template.py              what Ollama is told beside the file
"""

EXTRA = "gguf"  # of pyproject.toml
