"""Description of a weight gradient that may be computed from a sample of dy, or from all of it; without tensors."""

from dataclasses import dataclass, replace

import torch

from semisparse.gemm.problem import bucket_of


@dataclass(frozen=True, slots=True)
class WeightGradient:
    """dW = dy^T x in fp8, with all that happens to dy for it: rounding, or rounding and sampling, and its sum.

    Two ways lead to it: S(dy)^T x8 with a sample of dy, which is a 2:4 product whose mean is dy^T x8, or dy8^T x8, a
    dense fp8 product. The first pays where the sparse product saves more than drawing the sample costs.

    Attributes:
        tokens: M.
        out_features: N.
        in_features: K.
        dtype: Of dy (M x N).
        out_dtype: Of dW (N x K).
        bias: Whether the sum of dy over the tokens is wanted, too.
    """

    tokens: int
    out_features: int
    in_features: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    bias: bool = False

    @property
    def bucket(self) -> "WeightGradient":
        """The weight gradient whose measurement this one shares: tokens rounded up to a bucket."""
        return replace(self, tokens=bucket_of(self.tokens))

    def key(self) -> dict[str, object]:
        """The fields as JSON values. But for the dtypes and the bias, keys of products have none of them."""
        read, written = self._dtypes
        return {
            "way": "fp8 weight gradient",
            "dtype": read,
            "out_dtype": written,
            "bias": self.bias,
            "token_axis": "tokens",
            "tokens": self.tokens,
            "out_features": self.out_features,
            "in_features": self.in_features,
        }

    @property
    def _dtypes(self) -> tuple[str, str]:
        read, written = (str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.out_dtype))
        return read, written

    def __str__(self) -> str:
        read, written = self._dtypes
        summed = " and its sum" if self.bias else ""
        return (
            f"dW ({self.out_features}x{self.in_features}, {written}) in fp8 from dy "
            f"({self.tokens}x{self.out_features}, {read}){summed}"
        )
