"""One file a family of models: everything that the kit knows of it by name, as data.

A new family of known wiring is a file here and a line in `registry.py`. Who asks: `engine/` for the wiring of a decoder
layer, `memory/` and `training/` for sizes that config.json leaves out and for what a layer keeps, `formats/gguf/` and
`formats/adapter/` for llama.cpp's names and rules and for templates in Ollama's language, `model/` for the demo base,
`schema/` for names of the kit's own templates.
"""
