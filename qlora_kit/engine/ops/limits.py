"""What kernels take at the most; without torch, since memory is planned by it before a model is loaded."""

AMPERE = (8, 0)  # compute capability of the first GPUs with flash attention in torch, and bfloat16
LARGEST_RANK = 256  # of an adapter that a kernel adds on the way: it unrolls the sum, and a larger one is no small part
FUSED_RANK = 64  # of an MLP's adapters, whose sums fit into the registers of the kernel of its gated product
RECORDED_SPARE = 1.1  # memory that recordings may take, for what a step was seen to take: pools do not share their gaps
LOGITS_TILE_BYTES = 256_000_000  # of logits that exist at a time
WHOLE_BYTES = 256 << 20  # of the unpacked weights of experts; of a larger stack one half is unpacked at a time
