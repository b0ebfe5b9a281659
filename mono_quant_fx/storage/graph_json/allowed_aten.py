"""The operators of the dispatcher that a graph read from data may call, by family; graph_ops resolves them.

Captures of torch.nn's modules and of the models in the tests call these, or would with other arguments. Each was run on
hostile arguments with guarded memory (tests/graph_fuzz.py). An operator that torch gains is not callable until it
stands here. Every overload of a name is meant, but those that write into `out` and those that only TorchScript has.

What is left out, and why:

- as_strided, _reshape_alias, set_, resize_, unsafe_*, _unsafe_*: sizes, strides and indices are taken on trust.
- view.dtype and its like: bytes as another type, so that a bool may be neither 0 nor 1.
- upsample_*.default, given both sizes and scales that contradict them; lstm.data and its like, given a batch of none.
- empty, empty_like, new_empty, empty_strided: what was in the memory before becomes readable.
- native_batch_norm, _native_batch_norm_legit, _weight_norm, _softmax, _fft_*, _scaled_dot_product_*, _thnn_*, _cdist_*,
  and every other inner part of an operator: the checks stand in the operator that is called from outside.
- embedding_bag, ctc_loss, segment_reduce, max_unpool, put_, take, _embedding_bag, searchsorted, unique_dim, renorm,
  istft, *_backward: they index with tensors, or with numbers, that are not all compared with the sizes.
- t_, transpose_, squeeze_, unsqueeze_, swapaxes_, set_data, detach_: they give a stored tensor another shape in place.
- grid_sampler and the reductions with numbers for names: out of their range they leave the result as it was allocated.
- sparse_*, mkldnn_*, quantized_*, fbgemm_*, q_*: layouts and types that a stored graph does not have.
- from_file, save, record_stream, pin_memory, requires_grad_, retain_grad, names: they reach beyond their tensors.
"""

from __future__ import annotations

ATEN = {
    "arithmetic": (
        "abs absolute add addcdiv addcmul clamp clamp_max clamp_min clip div divide float_power floor_divide fmax fmin "
        "fmod lerp maximum minimum mul multiply neg negative positive pow reciprocal remainder rsqrt rsub sqrt square "
        "sub subtract true_divide"
    ),
    "functions of one value": (
        "acos acosh angle arccos arccosh arcsin arcsinh arctan arctan2 arctanh asin asinh atan atan2 atanh ceil "
        "copysign cos cosh deg2rad digamma erf erfc erfinv exp exp2 expm1 fix floor frac frexp heaviside hypot ldexp "
        "lgamma log log10 log1p log2 logaddexp logaddexp2 logit nan_to_num rad2deg round sgn sigmoid sign signbit sin "
        "sinc sinh special_entr special_erf special_erfc special_expit special_expm1 special_log1p special_logit tan "
        "tanh trunc xlogy"
    ),
    "complex numbers": (
        "_conj complex conj conj_physical imag is_complex polar real resolve_conj resolve_neg view_as_complex "
        "view_as_real"
    ),
    "comparisons and logic": (
        "__and__ __lshift__ __or__ __rshift__ __xor__ allclose bitwise_and bitwise_left_shift bitwise_not bitwise_or "
        "bitwise_right_shift bitwise_xor eq equal ge greater greater_equal gt isclose isfinite isinf isnan isneginf "
        "isposinf isreal le less less_equal logical_and logical_not logical_or logical_xor lt masked_fill ne not_equal "
        "where"
    ),
    "types, copies and sizes": (
        "_assert_async _assert_scalar _assert_tensor_metadata _local_scalar_dense _to_copy alias clone contiguous copy "
        "detach is_floating_point is_nonzero is_same_size item lift_fresh_copy numel scalar_tensor size "
        "sym_constrain_range sym_constrain_range_for_size sym_numel sym_size sym_storage_offset sym_stride to type_as"
    ),
    "new tensors": (
        "arange eye fill full full_like linspace logspace new_full new_ones new_zeros ones ones_like tril_indices "
        "triu_indices zero zeros zeros_like"
    ),
    "random numbers": (
        "alpha_dropout bernoulli dropout feature_alpha_dropout feature_dropout multinomial normal rand rand_like "
        "randint randint_like randn randn_like randperm rrelu"
    ),
    "views within bounds, and their copies": (
        "adjoint atleast_1d atleast_2d atleast_3d broadcast_tensors broadcast_to chunk diagonal diagonal_copy dsplit "
        "expand expand_as expand_copy flatten hsplit mH mT matrix_H moveaxis movedim narrow narrow_copy numpy_T "
        "permute permute_copy ravel reshape reshape_as select select_copy slice slice_copy split split_copy "
        "split_with_sizes split_with_sizes_copy squeeze squeeze_copy swapaxes swapdims t t_copy tensor_split transpose "
        "transpose_copy unbind unbind_copy unflatten unfold unfold_copy unsqueeze unsqueeze_copy view view_as "
        "view_copy vsplit"
    ),
    "joined, repeated and moved": (
        "block_diag cartesian_prod cat channel_shuffle col2im column_stack concat concatenate "
        "constant_pad_nd diag diag_embed diagflat dstack flip fliplr flipud hstack im2col meshgrid pad pixel_shuffle "
        "pixel_unshuffle reflection_pad1d reflection_pad2d reflection_pad3d repeat repeat_interleave replication_pad1d "
        "replication_pad2d replication_pad3d roll rot90 stack tile trace tril triu vstack"
    ),
    "places by index, compared with the sizes": (
        "argwhere bucketize diagonal_scatter embedding gather index index_add index_copy index_fill index_put "
        "index_select masked_scatter masked_select nonzero nonzero_numpy one_hot scatter scatter_add scatter_reduce "
        "select_scatter slice_scatter take_along_dim"
    ),
    "sums, order and counts": (
        "all amax amin aminmax any argmax argmin argsort count_nonzero cummax cummin cumprod cumsum diff histc "
        "kthvalue linalg_matrix_norm linalg_norm linalg_vector_norm logcumsumexp logsumexp max mean median min msort "
        "nanmean nanmedian nansum norm prod quantile sort special_logsumexp std std_mean sum sum_to_size topk var "
        "var_mean"
    ),
    "products": (
        "addbmm addmm addmv addr baddbmm bilinear bmm cosine_similarity cross dot einsum inner kron linalg_cross "
        "linalg_matmul linalg_multi_dot linalg_vecdot linear matmul mm mv outer pairwise_distance tensordot vdot"
    ),
    "activations": (
        "celu elu gelu glu hardshrink hardsigmoid hardswish hardtanh leaky_relu log_sigmoid log_softmax mish prelu "
        "relu relu6 selu silu softmax softplus softshrink threshold"
    ),
    "norms": "batch_norm group_norm instance_norm layer_norm rms_norm",
    "convolutions and pools": (
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
        "adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d conv1d conv2d conv3d conv_transpose1d conv_transpose2d "
        "conv_transpose3d max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d "
        "max_pool3d_with_indices upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d "
        "upsample_nearest2d upsample_nearest3d upsample_trilinear3d"
    ),
    "attention and recurrence": (
        "gru gru_cell lstm lstm_cell rnn_relu rnn_relu_cell rnn_tanh rnn_tanh_cell scaled_dot_product_attention"
    ),
    "Fourier transforms": (
        "fft_fft fft_fft2 fft_fftn fft_fftshift fft_hfft fft_ifft fft_ifft2 fft_ifftn fft_ifftshift fft_ihfft "
        "fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftn stft"
    ),
    "losses": (
        "binary_cross_entropy binary_cross_entropy_with_logits cross_entropy_loss huber_loss kl_div l1_loss mse_loss "
        "nll_loss_nd smooth_l1_loss"
    ),
    "written in place, with the sizes as they are": (
        "__iand__ __ior__ __ixor__ abs_ add_ addcdiv_ addcmul_ addmm_ baddbmm_ bitwise_and_ bitwise_not_ bitwise_or_ "
        "bitwise_xor_ ceil_ celu_ clamp_ clamp_max_ clamp_min_ copy_ cos_ cumprod_ cumsum_ div_ dropout_ elu_ eq_ erf_ "
        "exp_ expm1_ fill_ fill_diagonal_ floor_ floor_divide_ fmod_ ge_ gt_ hardsigmoid_ hardswish_ hardtanh_ "
        "index_add_ index_copy_ index_fill_ index_put_ le_ leaky_relu_ lerp_ log10_ log1p_ log2_ log_ logical_and_ "
        "logical_not_ logical_or_ lt_ masked_fill_ masked_scatter_ mish_ mul_ nan_to_num_ ne_ neg_ pow_ reciprocal_ "
        "relu6_ relu_ remainder_ round_ rsqrt_ scatter_ scatter_add_ scatter_reduce_ selu_ sigmoid_ sign_ silu_ sin_ "
        "sqrt_ square_ sub_ tanh_ threshold_ tril_ triu_ trunc_ zero_"
    ),
}

#: Overloads of these names that take bytes for another type, or do not compare their arguments.
ATEN_OVERLOADS_REFUSED = (
    "view.dtype view_copy.dtype upsample_bicubic2d.default upsample_bilinear2d.default upsample_linear1d.default "
    "upsample_nearest1d.default upsample_nearest2d.default upsample_nearest3d.default upsample_trilinear3d.default "
    "gru.data lstm.data rnn_relu.data rnn_tanh.data"
)

#: What to do instead of some that are left out.
WAYS_OUT = {
    "_weight_norm _weight_norm_interface": (
        "its kernel does not compare its sizes; call torch.nn.utils.parametrize.remove_parametrizations(module, "
        "'weight') first, which leaves a plain weight"
    ),
    "empty empty_like empty_strided new_empty": (
        "it gives out memory as it was left; make the tensor with zeros, or full, instead"
    ),
    "as_strided _reshape_alias": "it trusts its strides; write it with view, unfold or slices instead",
}
