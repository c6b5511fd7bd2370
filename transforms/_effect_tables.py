"""Names of torch functions and methods whose effect their operator schemas do not tell, or not by that name."""

TORCH_MODULES = frozenset(
    "torch torch.functional torch.special torch.linalg torch.fft torch._C._nn torch._C._special torch._C._linalg "
    "torch._C._fft torch._C._sparse torch._VF torch.nn.functional torch._tensor".split()
)
ARITHMETIC = frozenset("add sub mul truediv floordiv mod pow and or xor lshift rshift matmul div concat".split())
OPERATORS = frozenset(
    "add sub mul truediv floordiv mod pow and_ or_ xor lshift rshift matmul neg pos abs invert not_ eq ne lt le gt ge "
    "getitem index contains is_ is_not truth concat and or neg invert".split()
)
# On two containers these give a container of the same elements, so a fresh result is known only beside a tensor.
JOINS_CONTAINERS = frozenset("add mul or_ and_ xor sub concat radd rmul or and".split())
METADATA = frozenset(
    "shape dtype device ndim size dim ndimension numel nelement layout itemsize is_cuda is_sparse element_size stride "
    "is_contiguous is_floating_point is_complex is_signed get_device".split()
)
# Views (or, for reshape, contiguous and flatten, usually one): carrying them over the cut saves the step nothing.
VIEWS = frozenset(
    "view view_as reshape reshape_as flatten unflatten squeeze unsqueeze expand expand_as transpose permute movedim "
    "moveaxis swapaxes swapdims t T mT H mH select narrow unbind split chunk tensor_split hsplit vsplit dsplit detach "
    "contiguous diagonal real imag data ravel view_as_real view_as_complex adjoint".split()
)
MAPPING_METHODS = frozenset("get keys values items".split())
# Methods that tensors have without an effect, and arrays or lists with one: what the receiver is must be known.
IN_PLACE_ELSEWHERE = frozenset("sort put resize".split())
# Python functions and methods of torch that are made of pure operators only but have no operator of their name.
ALIKE = frozenset(
    "unique unique_consecutive normalize cosine_similarity pairwise_distance interpolate grid_sample affine_grid softmin "
    "softsign tanhshrink local_response_norm lp_pool1d lp_pool2d lp_pool3d cross_entropy gaussian_nll_loss fold bfloat16 "
    "bool byte char double float half int long short type new_tensor tolist numpy item as_tensor tensor from_numpy "
    "asarray unravel_index cpu logsigmoid is_tensor norm pad one_hot embedding embedding_bag nbytes cdouble cfloat chalf "
    "upsample upsample_nearest upsample_bilinear multilabel_soft_margin_loss max_unpool1d max_unpool2d max_unpool3d "
    "_threshold _sparse_mm lu".split()
)
# lstsq leaves elements unset; what empty memory holds is no value that a plain run repeats.
NOT_PURE = frozenset(
    "backward retain_grad set_data register_hook requires_grad_ data_ptr Size lstsq linalg_lstsq".split()
)
RANDOM_COMPOSITES = frozenset(
    "gumbel_softmax fractional_max_pool2d fractional_max_pool3d fractional_max_pool2d_with_indices lstm gru rnn_tanh "
    "rnn_relu dropout1d dropout2d dropout3d pca_lowrank svd_lowrank".split()
)
# Operations that draw or write only when an argument says so: (its name, its position in the functional form).
SWITCHED_OFF: dict[str, tuple[str | None, int]] = {
    "dropout": ("training", 2),
    "dropout1d": ("training", 2),
    "dropout2d": ("training", 2),
    "dropout3d": ("training", 2),
    "alpha_dropout": ("training", 2),
    "feature_alpha_dropout": ("training", 2),
    "rrelu": ("training", 3),
    "batch_norm": ("training", 5),
    "scaled_dot_product_attention": ("dropout_p", 4),
}
DEFAULTS = {"dropout_p": 0.0}
# Composite operators, whose schemas are not held to what they say of memory, that always return memory of their own.
# Each was compared with what it returns; `tests/test_effects_sweep.py` does so again.
FRESH_COMPOSITES = frozenset(
    "linear matmul layer_norm group_norm rms_norm conv1d conv2d conv3d conv_transpose1d conv_transpose2d "
    "conv_transpose3d softmax log_softmax max_pool1d max_pool2d max_pool3d avg_pool1d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d one_hot embedding_bag hstack vstack dstack column_stack isclose pad "
    "normalize cosine_similarity cross_entropy nll_loss isfinite std var logsumexp embedding logical_not "
    "bucketize searchsorted masked_fill unique".split()
)
# Operators that return memory of their input though their schema does not say so.
SHARING_UNSAID = frozenset(
    "_unsafe_view unsafe_split unsafe_chunk unsafe_split_with_sizes lift lift_fresh _lazy_clone data _nested_get_values "
    "_nested_view_from_buffer sum_to_size".split()
)
NORMS_WITH_STATE = ("batch_norm", "instance_norm")
"""Composites whose schemas do not show that they write their running statistics."""

EXACT = frozenset(
    "add sub mul truediv div neg pos abs and or xor not invert eq ne lt le gt ge where clamp minimum maximum getitem "
    "index_select gather take embedding one_hot cat concat stack to type float double half bfloat16 int long short byte char "
    "bool bucketize searchsorted unique isin arange zeros ones full zeros_like ones_like full_like tensor as_tensor "
    "from_numpy roll flip repeat repeat_interleave tril triu masked_fill clone bitwise_and bitwise_or bitwise_xor "
    "logical_and logical_or logical_not lshift rshift sort argsort topk isnan isfinite sign floor ceil trunc round".split()
)
"""Operations that give the same bits however their elements are split among threads."""

# Operators of these namespaces talk to other ranks, time, print, or hold state outside their arguments.
EFFECTFUL_NAMESPACES = frozenset(
    "c10d c10d_functional _c10d_functional _c10d_functional_autograd _dtensor symm_mem distributed profiler record_function "
    "inductor _inductor_test prim prims rngprims debugprims streams fsdp higher_order export cuda aoti".split()
)
