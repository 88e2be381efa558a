"""Every operation of the engine by its name; one parametrized test holds that kernel, reference and autograd agree."""

from typing import Any

from qlora_kit.engine.ops import (
    activation,
    expert_factors,
    expert_rows,
    four_bit,
    fp8_rows,
    fused_linear_cross_entropy,
    glu,
    layer_norm,
    lora_delta,
    output_gate,
    rms_norm,
    rope,
    split_k,
)
from qlora_kit.engine.ops.op import Op

OPS: dict[str, Op[Any, Any]] = {
    op.name: op
    for op in (
        rms_norm.rms_norm,
        rms_norm.rms_norm_add,
        rms_norm.rms_scale,
        rms_norm.rms_norm_backward,
        rms_norm.rms_norm_backward_add,
        layer_norm.layer_norm,
        layer_norm.layer_norm_backward,
        layer_norm.layer_norm_backward_add,
        activation.activate,
        activation.activate_backward,
        rope.rotate,
        rope.rotate_pairs,
        output_gate.output_gate,
        output_gate.output_gate_backward,
        rope.rope,
        rope.rope_backward,
        lora_delta.add_n,
        glu.gated_product,
        glu.gated_product_backward,
        glu.glu,
        glu.glu_backward,
        split_k.split_k_matmul,
        split_k.reduce_partials_op,
        expert_factors.thin_product,
        expert_factors.thin_outer,
        expert_rows.spread,
        expert_rows.added_up,
        expert_rows.weighed_glu,
        expert_rows.weighed_glu_backward,
        four_bit.unpack,
        four_bit.unpack_transposed,
        fp8_rows.quantize_rows,
        fused_linear_cross_entropy.fold,
        fused_linear_cross_entropy.cap_logits,
    )
}
