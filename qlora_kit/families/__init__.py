"""One file a family of models: everything that the kit knows of it by name, as data.

A new family of known wiring is a file here and a line in `registry.py`. Who asks: `engine/` for the wiring of a decoder
layer, `memory/` for sizes that config.json leaves out, `export/gguf/` for llama.cpp's names and rules,
`export/serving/` for templates in Ollama's language.
"""
