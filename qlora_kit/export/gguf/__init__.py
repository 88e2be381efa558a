"""Hugging Face folder -> GGUF file: names, metadata, vocabulary, block formats.

The container is written by the official `gguf` package and the blocks by llama.cpp's row kernels, as the wheels of
xllamacpp and libgguf have them, so no compiler is needed. Names, metadata, vocabulary and the type rules of each mix
follow llama.cpp of autumn 2026 (the conversion scripts and `src/llama-quant.cpp`, releases around b11500).

    write_gguf(model_dir, out_file, "Q4_K_M")     in writer.py: the whole way
    mixes.py, overrides.py                        which tensor gets which type
    imatrix.py                                    the importance matrix that blocks are fitted to
    architectures.py                              which models, and how their tensors differ
    metadata.py                                   hyper-parameters and general.* keys
    vocabulary.py, pre_tokenizers.py              tokenizer, special ids, stop tokens, chat template
    safetensors_rows.py                           weights, a few rows at a time
    tensors.py, blocks.py, row_kernels.py         names, row order, quantization on all cores
    container.py, shards.py                       the file itself, and one model in several files
"""
