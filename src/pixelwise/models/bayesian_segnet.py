"""Bayesian SegNet and Bayesian SegNet-Basic: dropout in the deep layers, kept on to sample predictions.

Paper:  Kendall, Badrinarayanan, Cipolla. Bayesian SegNet: Model Uncertainty in Deep Convolutional Encoder-Decoder
        Architectures for Scene Understanding. BMVC 2017 (arXiv:1511.02680). The variant the paper settles on, dropout in
        the central encoders and decoders; places as in the authors' bayesian_segnet_train.prototxt (after pool3, pool4,
        pool5 and after the decoder's stages 5, 4, 3) and bayesian_segnet_basic_train.prototxt (pool3, pool4, stages 4, 3).
Differs from the paper: as `segnet` and `segnet_basic` do. `forward` in evaluation mode is the single pass without dropout
        that the paper calls weight averaging; `sample` is the paper's Monte-Carlo prediction.
Shapes: N batch, C channels, K classes, H W image size.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from pixelwise.models.registry import check_fields, register_model
from pixelwise.models.segnet import SegNet, SegNetBasic, SegNetBasicConfig, SegNetConfig, Unpooling
from pixelwise.ops.dropout import sample_with_dropout

DEEP = 3  # the first stage of the encoder that has dropout, and the last one of the decoder


@dataclass(frozen=True, kw_only=True)
class BayesianSegNetConfig(SegNetConfig):
    """The fields of a SegNet, and the share of values that dropout sets to zero."""

    dropout: float = 0.5

    def __post_init__(self) -> None:
        check_fields("bayesian_segnet", self)
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class BayesianSegNetBasicConfig(SegNetBasicConfig):
    """The fields of a SegNet-Basic, and the share of values that dropout sets to zero."""

    dropout: float = 0.5

    def __post_init__(self) -> None:
        check_fields("bayesian_segnet_basic", self)
        super().__post_init__()


class _Sampled(Unpooling):
    """What both networks add to their plain ones."""

    dropout: nn.Dropout

    def drop(self, x: Tensor, level: int) -> Tensor:
        return self.dropout(x) if level >= DEEP else x

    def sample(self, image: Tensor, *, samples: int = 50, seed: int | None = None) -> tuple[Tensor, Tensor]:
        """Mean probabilities (N, K, H, W) and uncertainty (N, H, W) over `samples` passes with dropout.

        Arguments, units and errors as in `pixelwise.ops.dropout.sample_with_dropout`.
        """
        return sample_with_dropout(self, image, samples=samples, seed=seed)


class BayesianSegNet(_Sampled, SegNet):
    """SegNet with dropout; its state is that of a SegNet, so that the weights of either serve the other."""

    def __init__(self, config: BayesianSegNetConfig) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(config.dropout)


class BayesianSegNetBasic(_Sampled, SegNetBasic):
    """SegNet-Basic with dropout; its state is that of a SegNet-Basic, so that the weights of either serve the other."""

    def __init__(self, config: BayesianSegNetBasicConfig) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(config.dropout)


PAPER = "Kendall, Badrinarayanan, Cipolla. Bayesian SegNet. BMVC 2017"
TINY = {"widths": (8, 8, 12, 12, 12), "dropout": 0.2}
register_model("bayesian_segnet", BayesianSegNet, BayesianSegNetConfig(), paper=PAPER, tiny=TINY)
CONFIG = BayesianSegNetBasicConfig()
register_model("bayesian_segnet_basic", BayesianSegNetBasic, CONFIG, paper=PAPER, tiny={"width": 6})
