"""Names of torch's calls by whose memory their results lie in; effects.py reads them together with schemas."""

from __future__ import annotations

from torch import nn


def words(text: str) -> frozenset[str]:
    """A table of names."""
    return frozenset(text.split())


#: Give a view of their first argument, whatever its strides.
VIEWS = words(
    "view view_as transpose permute t T mT H mH adjoint numpy_T matrix_H movedim moveaxis swapaxes swapdims unsqueeze "
    "squeeze expand expand_as broadcast_to slice narrow select diagonal unflatten detach alias as_strided unfold real "
    "imag view_as_real view_as_complex conj data lift_fresh"
)
#: Give a tuple of views.
PIECES = words(
    "chunk split split_with_sizes unbind tensor_split hsplit vsplit dsplit unsafe_chunk unsafe_split "
    "unsafe_split_with_sizes"
)
#: Give their first argument itself in eval mode.
IDENTITIES = words("dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout positive pos")
#: Give a view, their argument itself or a copy, as strides and dtypes have it.
EITHER = words(
    "reshape reshape_as flatten ravel contiguous to type type_as float double half bfloat16 int long short char byte "
    "bool cfloat cdouble cpu cuda sum_to_size einsum atleast_1d atleast_2d atleast_3d broadcast_tensors meshgrid "
    "cartesian_prod as_tensor asarray resolve_conj resolve_neg conj_physical native_dropout feature_dropout "
    "pixel_shuffle pixel_unshuffle channel_shuffle _unsafe_view _reshape_alias"
)
IDENTITY_MODULES = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip
EITHER_MODULES = (nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)
#: Give plain numbers and the like.
NUMBERS = words(
    "size dim numel nelement stride item tolist ndimension storage_offset element_size get_device is_contiguous "
    "is_floating_point is_complex len sym_size sym_numel sym_stride sym_int sym_float shape dtype device ndim layout "
    "requires_grad is_cuda itemsize nbytes is_sparse is_quantized is_meta grad_fn is_leaf"
)
#: Give tuples, some of them only if asked.
TUPLES = words(
    "max min topk sort median nanmedian mode kthvalue aminmax unique unique_consecutive lstm gru rnn_tanh rnn_relu svd "
    "qr eig eigh slogdet var_mean std_mean frexp cummax cummin meshgrid broadcast_tensors split_with_sizes_copy"
)
ONE_TENSOR = (
    nn.Linear, nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softmax, nn.LogSoftmax, nn.Softplus, nn.PReLU,
    nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd,
    nn.Flatten, nn.Unflatten, nn.Embedding, nn.modules.conv._ConvNd, nn.modules.pooling._AvgPoolNd, nn.Upsample,
    nn.modules.pooling._AdaptiveAvgPoolNd, nn.PixelShuffle, nn.PixelUnshuffle, nn.ConstantPad2d, nn.ZeroPad2d,
)  # fmt: skip
#: Change how a tensor object looks at its memory, and not what lies there.
RESHAPERS = words("t_ transpose_ squeeze_ unsqueeze_ swapaxes_ swapdims_ detach_")
HARMLESS = frozenset(("requires_grad_", "retain_grad"))
