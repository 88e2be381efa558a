"""How the arithmetic of a training step is run: one decoder layer after another, by hand. This page is the map.

One layer forward. h is `[rows, tokens, hidden]`; W is frozen, A and B are LoRA's, xa is x A^T:

    h ---------------------------------+
    | Norm.forward                     |    x
    | LinearGroup.forward_frozen       |    x W^T of q, k and v, and one xa for all three
    | rope                             |    x W^T + xa B^T, rotated, in one kernel         project
    v                                  |                                                   (layer/attention_blocks.py)
    q, k, v                            |
    | Attention.attend                 |    the model's own attention, or attention/
    v                                  |
    a                                  |
    | LinearGroup.forward_frozen       |    a W^T of the output module, and its xa
    v                                  v
    h2 = add_n: o + xa B^T + residual                                                      project_add
    |                                  |
    | Norm.forward                     |
    | LinearGroup.forward_frozen       |    x W^T of gate and up, and one xa for both      Mlp.forward: gated_mlp
    | glu                              |    act(gate + ..) * (up + ..), and xa of down     (layer/mlp.py; the seam
    | LinearGroup.forward_frozen       |    p W^T of down                                   where experts can stand)
    v                                  v
    h3 = add_n: down + xa B^T + residual

and backward, from d_h3 to d_h; the gradients of A and B are made on the way:

    GatedMlp.backward      backward_xa, backward_input of down      d_h3 -> d_xa of down, d_p
                           glu_backward                             d_p -> d_gate, d_up, and the sums for A and B
                           backward_xa, backward_input              d_gate, d_up -> d_xa, d_x
                           Norm.backward_add                        d_x, d_h3 -> d_h2
    ProjectAdd.backward    LinearGroup.backward                     d_h2 -> d_a; d_h2 itself goes on as the residual's
    attention's own                                                 d_a -> d_q, d_k, d_v
    NormProject.backward   rope_backward                            d_q, d_k -> the gradients of x W^T + xa B^T
                           backward_xa, backward_input              -> d_xa, d_x
                           Norm.backward_add                        d_x, the residual's d_h2 -> d_h
    in each                split_k_matmul, reduce_partials          d_xa^T x, d_y^T xa -> the gradients of A and B

What is kept in between, where memory is free (`CheckpointPolicy.keep_all`), and what is recomputed:

    project        keeps h, xa, and q and k before their norms, if heads are normed
    attention      keeps q, k, v, its output and a number for each token and head
    project_add    keeps a, xa, and the module's output before a norm, if one follows
    gated_mlp      keeps h2, gate, up, both xa, and the module's output before a norm, if one follows
    again always   norms, act(gate) * up, and W, which is unpacked for each product and let go

The order to read it in:

    ops/           one operation a file: torch reference, kernel, and when the kernel is taken
      op.py registry.py jit.py compiled.py limits.py            what an operation is, and all of them
      rms_norm.py lora_delta.py rope.py glu/ split_k.py         those of the picture
      layer_norm.py activation.py output_gate.py                what some families have instead, or beside them
      expert_rows.py expert_factors.py                          between the products of experts, and thin ones
      four_bit.py fp8_rows.py fused_linear_cross_entropy.py     weights, activations in fp8, the output head
    linear/        linear modules that read one input: their products and gradients
      frozen_weight.py fp8.py concatenated_weights.py           W in 4, 16 or 8 bit
      adapted_linear.py linear_group.py                         and LoRA beside it
    layer/         the picture itself
      norm.py attention_blocks.py mlp.py                        its parts, forward and backward
      ungated_mlp.py                                            another kind of MLP
      attention_part.py plain_part.py                           attention as a whole; a part left as it is
      experts.py                                                between the products of a mixture's experts
      layer_parts.py tail.py                                    a layer of such parts, and what some do to its result
      extract.py activations.py                                 found in a layer of transformers, by its family
      trial.py                                                  held against what the layer itself gives
      fast.py                                                   put in the place of the layer's own forward
      checkpoint_policy.py kept_memory.py                       what is kept, and how much
      layer_needs.py without_weights.py                         how much, before there are weights
    attention/     packed.py rows.py                            samples in one row, rows padded on the right: no mask
                   flash.py sinks.py                           by flash kernels; and with a share that goes nowhere
                   carried_state.py                            and in linear attention: states that begin anew
                   without_weights.py                          whether a model can be packed, before there are weights
    graphs/        layer_graphs.py captured_layer.py            layers launched as CUDA graphs
                   capture_schedule.py                         for which shapes of batches
                   recording_room.py                           whether there is memory for them, and beside them
                   hidden_places.py                            what they read and write, whatever the batch's shape
                   host_memory.py host_passage.py              what is kept on the host meanwhile
    head.py        the output head at trained positions alone
"""
