"""What a safetensors folder holds, read from the headers alone."""

from pathlib import Path

from qlora_kit.weights.headers import read_header, read_headers

NOT_LINEAR = ("norm", "layernorm", "embed", "lm_head")


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a folder's safetensors files, of a model or of an adapter.

    Raises:
        DamagedFileError: a file is not safetensors, or it is truncated.
    """
    return {tensor.name: tensor.shape for path in sorted(folder.glob("*.safetensors")) for tensor in read_header(path)}


def linear_module_names(folder: Path) -> set[str]:
    """Last parts of the names of the linear modules, the embedding and the output head aside.

    Raises:
        DamagedFileError: a file is missing, truncated or not safetensors.
    """
    if not any(folder.glob("*.safetensors")):
        return set()
    modules = [
        name.removesuffix(".weight")
        for name, tensor in read_headers(folder).items()
        if len(tensor.shape) == 2 and name.endswith(".weight")
    ]
    last = {module.rsplit(".", 1)[-1] for module in modules}
    return {name for name in last if not any(part in name for part in NOT_LINEAR)}
