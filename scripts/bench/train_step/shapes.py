"""Random models of known shapes, made as NF4 with double quantization where they will train.

No linear weight but one of each size is ever held in 16 bit: every layer gets a copy of the same packed random weight.
"""

import copy
from pathlib import Path

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.quantizers.auto import AutoHfQuantizer

CONTEXT = 1 << 20  # so that no stack scales positions, whatever length is tried
HEAD = "lm_head"
SPREAD = 0.02  # standard deviation of random weights
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def config_of(shape: str) -> LlamaConfig:
    """The sizes of `1b` (Llama 3.2 1B), `8b` and `70b` (Llama 3.1), and `tiny`, which a CPU trains in seconds."""
    hidden, inner, layers, heads, kv_heads, vocabulary, tied = {
        "tiny": (64, 128, 2, 4, 2, 512, False),
        "1b": (2048, 8192, 16, 32, 8, 128256, True),
        "8b": (4096, 14336, 32, 32, 8, 128256, False),
        "70b": (8192, 28672, 80, 64, 8, 128256, False),
    }[shape]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=CONTEXT,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        dtype=torch.bfloat16,
        attn_implementation="sdpa",
    )


def device() -> torch.device:
    """The GPU, or else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def random_base(shape: str) -> LlamaForCausalLM:
    """A causal model of a shape, as transformers would load it from a 4-bit folder; embeddings and head are bf16."""
    torch.manual_seed(0)
    config = config_of(shape)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    _quantize_linears(model)
    _fill_the_rest(model)
    # The frequencies are buffers that no checkpoint holds, so they are computed anew outside of the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device())
    model.tie_weights()
    _declare_quantized(model)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise RuntimeError(f"left on the meta device: {left}")
    return model.train()


def frozen_shapes(config: LlamaConfig) -> dict[tuple[int, int], int]:
    """(out, in) of every quantized linear layer, and how many there are of it in the model."""
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    keys = config.num_key_value_heads * config.head_dim
    counts: dict[tuple[int, int], int] = {}
    for size in ((hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)):
        counts[size] = counts.get(size, 0) + layers
    for size in ((inner, hidden), (inner, hidden), (hidden, inner)):
        counts[size] = counts.get(size, 0) + layers
    return counts


def _quantize_linears(model: LlamaForCausalLM) -> None:
    packed: dict[tuple[int, int], tuple[torch.Tensor, QuantState]] = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear) or name == HEAD:
            continue
        size = (module.out_features, module.in_features)
        if size not in packed:
            weight = torch.randn(size, device=device(), dtype=torch.bfloat16) * SPREAD
            packed[size] = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            del weight
        model.set_submodule(name, _linear(size, *packed[size]))


def _linear(size: tuple[int, int], packed: torch.Tensor, state: QuantState) -> Linear4bit:
    out_features, in_features = size
    linear = Linear4bit(
        in_features, out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
    )
    own_state = copy.deepcopy(state)
    linear.weight = Params4bit(
        packed.clone(), quant_state=own_state, quant_type="nf4", bnb_quantized=True, module=linear
    )
    linear.quant_state = own_state
    # On some CPUs bitsandbytes would repack the weight in eval mode, after which no gradient passes it.
    linear.support_avx512bf16_for_cpu = False
    return linear


def _fill_the_rest(model: LlamaForCausalLM) -> None:
    tied = model.config.tie_word_embeddings
    for name, parameter in list(model.named_parameters()):
        if not parameter.is_meta or (tied and name.startswith(HEAD)):
            continue
        value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device())
        if "norm" in name:
            value.fill_(1)
        else:
            value.normal_(std=SPREAD)
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, torch.nn.Parameter(value, requires_grad=False))


def _declare_quantized(model: LlamaForCausalLM) -> None:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=[HEAD],
    )
    model.hf_quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=True)
    model.quantization_method = quantization.quant_method
    model.config.quantization_config = quantization
    model.is_loaded_in_4bit = True


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and three special tokens; the rows are ids already, so nothing is tokenized with it."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate((*names, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.add_special_tokens(names)
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


def save_base(shape: str, folder: Path) -> None:
    """Write a random base and its tokenizer as a 4-bit checkpoint, for stacks with a loader of their own."""
    model = random_base(shape)
    partial = folder.with_name(f"{folder.name}.partial")
    model.save_pretrained(partial)
    tiny_tokenizer().save_pretrained(partial)
    partial.rename(folder)


def is_4bit(module: torch.nn.Module) -> bool:
    """Whether a module is one of bitsandbytes' 4-bit layers."""
    return isinstance(module, bitsandbytes.nn.Linear4bit)
