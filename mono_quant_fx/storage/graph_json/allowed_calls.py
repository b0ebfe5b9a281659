"""The functions, methods and modules' operators that a graph read from data may call, name by name.

graph_ops resolves them, and nothing else does. A name that torch gains is not callable until it stands here. What is
left out on purpose, beside what allowed_aten tells: whatever reads or writes files, memory addresses, hooks, gradients,
random seeds or other global state, and whatever takes a Python function. The keyword `out` is never allowed.
"""

from __future__ import annotations

#: home -> the names of it, as words.
FUNCTIONS = {
    "torch.nn.functional": (
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
        "adaptive_max_pool3d affine_grid alpha_dropout avg_pool1d avg_pool2d avg_pool3d batch_norm bilinear "
        "binary_cross_entropy binary_cross_entropy_with_logits celu celu_ channel_shuffle conv1d conv2d conv3d "
        "conv_transpose1d conv_transpose2d conv_transpose3d cosine_similarity cross_entropy dropout dropout1d "
        "dropout2d dropout3d elu elu_ embedding feature_alpha_dropout fold gelu glu group_norm hardshrink "
        "hardsigmoid hardswish hardtanh hardtanh_ huber_loss instance_norm interpolate kl_div l1_loss layer_norm "
        "leaky_relu leaky_relu_ linear local_response_norm log_softmax logsigmoid lp_pool1d lp_pool2d lp_pool3d "
        "max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d max_pool3d_with_indices "
        "mish mse_loss multi_head_attention_forward nll_loss normalize one_hot pad pairwise_distance pixel_shuffle "
        "pixel_unshuffle prelu relu relu6 relu_ rms_norm rrelu scaled_dot_product_attention selu selu_ sigmoid silu "
        "smooth_l1_loss softmax softmin softplus softshrink softsign tanh tanhshrink threshold threshold_ unfold "
        "upsample upsample_bilinear upsample_nearest"
    ),
    "torch": (
        "_assert abs absolute acos acosh add addbmm addcdiv addcmul addmm addmv addr adjoint all allclose amax amin "
        "aminmax angle any arange arccos arccosh arcsin arcsinh arctan arctan2 arctanh argmax argmin argsort "
        "argwhere as_tensor asin asinh atan atan2 atanh atleast_1d atleast_2d atleast_3d avg_pool1d baddbmm "
        "batch_norm bernoulli bilinear bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift "
        "bitwise_xor block_diag bmm broadcast_tensors broadcast_to bucketize cartesian_prod cat ceil celu "
        "channel_shuffle chunk clamp clamp_max clamp_min clip clone column_stack complex concat "
        "concatenate conj constant_pad_nd conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d "
        "copysign cos cosh cosine_similarity count_nonzero cross cummax cummin cumprod cumsum deg2rad detach diag "
        "diag_embed diagflat diagonal diagonal_scatter diff digamma dist div divide dot dropout dsplit dstack "
        "einsum embedding eq equal erf erfc erfinv exp exp2 expm1 eye fill flatten flip fliplr flipud float_power "
        "floor floor_divide fmax fmin fmod frac frexp full full_like gather gcd ge greater greater_equal group_norm "
        "gt hamming_window hann_window hardshrink heaviside histc hsplit hstack hypot imag index_add index_copy "
        "index_fill index_put index_select inner instance_norm is_complex is_floating_point is_nonzero is_tensor "
        "isclose isfinite isin isinf isnan isneginf isposinf isreal kron kthvalue layer_norm ldexp le lerp less "
        "less_equal lgamma linspace log log10 log1p log2 log_softmax logaddexp logaddexp2 logcumsumexp logical_and "
        "logical_not logical_or logical_xor logit logspace logsumexp lt masked_fill masked_scatter masked_select "
        "matmul max max_pool1d max_pool2d max_pool3d maximum mean median meshgrid min minimum mm moveaxis movedim "
        "msort mul multinomial multiply mv nan_to_num nanmean nanmedian nansum narrow ne neg negative nonzero norm "
        "normal not_equal numel ones ones_like outer pairwise_distance permute pixel_shuffle pixel_unshuffle polar "
        "positive pow prelu prod quantile rad2deg rand rand_like randint randint_like randn randn_like randperm "
        "ravel real reciprocal relu relu_ remainder repeat_interleave reshape resolve_conj resolve_neg rms_norm "
        "roll rot90 round rsqrt rsub scalar_tensor scatter scatter_add scatter_reduce select select_scatter selu "
        "sgn sigmoid sign signbit sin sinc sinh slice_scatter softmax sort split split_with_sizes sqrt square "
        "squeeze stack std std_mean stft sub subtract sum swapaxes swapdims sym_float sym_int sym_ite sym_max "
        "sym_min sym_not sym_sqrt sym_sum t take_along_dim tan tanh tensor tensor_split tensordot threshold tile "
        "topk trace transpose tril tril_indices triu triu_indices true_divide trunc unbind unflatten unsqueeze var "
        "var_mean vdot view_as_complex view_as_real vsplit vstack where xlogy zeros zeros_like"
    ),
    "torch.fft": (
        "fft fft2 fftfreq fftn fftshift hfft ifft ifft2 ifftn ifftshift ihfft irfft irfft2 irfftn rfft rfft2 "
        "rfftfreq rfftn"
    ),
    "torch.linalg": ("cross matrix_norm multi_dot norm vecdot vector_norm"),
    "torch.special": ("digamma entr erf erfc erfinv expit expm1 log1p log_softmax logit logsumexp softmax"),
    "pure_writes": "set_item set_piece",
    "operator": (
        "abs add and_ concat contains eq floordiv ge getitem gt iadd iand ifloordiv ilshift imatmul imod imul index "
        "inv invert ior ipow irshift isub itruediv ixor le lshift lt matmul mod mul ne neg not_ or_ pos pow rshift "
        "setitem sub truediv truth xor"
    ),
    "math": (
        "acos acosh asin asinh atan atan2 atanh ceil copysign cos cosh degrees erf exp expm1 fabs floor fmod gcd "
        "hypot isfinite isinf isnan isqrt ldexp log log10 log1p log2 pow prod radians sin sinh sqrt tan tanh trunc"
    ),
    "builtins": ("abs bool float getattr int len max min round"),
}

#: Higher-order operators: they run a graph that is stored inside this one.
HIGHER_ORDER = "wrap_with_autocast wrap_with_set_grad_enabled"

#: The package's own operators; each checks its arguments itself.
OWN = (
    "dequantize_activation dequantize_int4 dequantize_int8 int4_linear int8_linear quantize_activation w4a8_linear "
    "w8a8_conv w8a8_linear"
)

#: The attributes that getattr may read.
ATTRIBUTES = "H T device dtype imag index itemsize layout mH mT nbytes ndim real requires_grad shape"

#: Methods of tensors that compute, copy or view.
METHODS = (
    "abs absolute acos acosh add addbmm addcdiv addcmul addmm addmv addr adjoint all allclose amax amin aminmax "
    "angle any arccos arccosh arcsin arcsinh arctan arctan2 arctanh argmax argmin argsort argwhere asin asinh atan "
    "atan2 atanh baddbmm bernoulli bfloat16 bitwise_and bitwise_left_shift bitwise_not bitwise_or "
    "bitwise_right_shift bitwise_xor bmm bool broadcast_to byte cdouble ceil cfloat char chunk clamp clamp_max "
    "clamp_min clip clone conj contiguous copysign cos cosh count_nonzero cpu cross cuda cummax cummin cumprod "
    "cumsum deg2rad detach diag diag_embed diagflat diagonal diagonal_scatter diff digamma dim dist div divide dot "
    "double dsplit element_size eq equal erf erfc erfinv exp exp2 expand expand_as expm1 fix flatten flip fliplr "
    "flipud float float_power floor floor_divide fmax fmin fmod frac gather ge ger get_device greater greater_equal "
    "gt half hardshrink heaviside histc hsplit hypot index_add index_copy index_fill index_put index_select inner "
    "int is_complex is_contiguous is_floating_point is_nonzero is_same_size is_signed isclose isfinite isinf isnan "
    "isneginf isposinf isreal item kron kthvalue ldexp le lerp less less_equal lgamma log log10 log1p log2 "
    "log_softmax logaddexp logaddexp2 logcumsumexp logical_and logical_not logical_or logical_xor logit logsumexp "
    "long lt masked_fill masked_scatter masked_select matmul max maximum mean median min minimum mm moveaxis "
    "movedim msort mul multinomial multiply mv nan_to_num nanmean nanmedian nansum narrow ndimension ne neg "
    "negative nelement new_full new_ones new_tensor new_zeros nonzero norm not_equal numel outer permute positive "
    "pow prelu prod quantile rad2deg ravel reciprocal relu remainder repeat repeat_interleave reshape reshape_as "
    "resolve_conj resolve_neg roll rot90 round rsqrt scatter scatter_add scatter_reduce select select_scatter sgn "
    "short sigmoid sign signbit sin sinc sinh size slice_scatter softmax sort split split_with_sizes sqrt square "
    "squeeze std stft stride sub subtract sum sum_to_size swapaxes swapdims t take_along_dim tan tanh tensor_split "
    "tile to topk trace transpose tril triu true_divide trunc type_as unbind unflatten unfold unsqueeze var vdot "
    "view view_as vsplit where xlogy"
)

#: Methods that write into their tensor, and leave it the sizes and strides that it has.
METHODS_IN_PLACE = (
    "abs_ add_ addcdiv_ addcmul_ addmm_ baddbmm_ bernoulli_ bitwise_and_ bitwise_not_ bitwise_or_ bitwise_xor_ "
    "ceil_ clamp_ clamp_max_ clamp_min_ clip_ copy_ cos_ cumprod_ cumsum_ div_ divide_ eq_ erf_ exp_ expm1_ fill_ "
    "fill_diagonal_ floor_ floor_divide_ fmod_ frac_ ge_ gt_ index_add_ index_copy_ index_fill_ index_put_ le_ "
    "lerp_ log10_ log1p_ log2_ log_ logical_and_ logical_not_ logical_or_ logical_xor_ logit_ lt_ masked_fill_ "
    "masked_scatter_ mul_ multiply_ nan_to_num_ ne_ neg_ negative_ normal_ pow_ reciprocal_ relu_ remainder_ round_ "
    "rsqrt_ scatter_ scatter_add_ scatter_reduce_ sigmoid_ sign_ sin_ sinh_ sqrt_ square_ sub_ subtract_ tan_ tanh_ "
    "tril_ triu_ true_divide_ trunc_ uniform_ zero_"
)
