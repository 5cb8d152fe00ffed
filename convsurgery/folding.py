"""Other people's code that takes an operator's filters for a convolution's: conv-bn folding, reparameterisation."""

from __future__ import annotations

import functools
import os
import re
import sys
from types import CodeType

import torch

from convsurgery.errors import ConversionError

__all__ = ["WAY_OUT", "refuse_folding"]

#: what to do instead, at the end of an error
WAY_OUT = "Fold or reparameterise the model first and convert it then, or fold a converted model by convsurgery.fuse"

_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
#: functions that read a convolution's filters to fold something into them
_FOLDS = re.compile(
    r"(?:(?<![A-Za-z])[fF]|(?<=[a-z])F)us(?:e(?!d)|ing)"  # not in diffusion or refuse
    r"|[rR]epara|(?:to|To)_?[dD]eploy|deploy_model"
    r"|(?i:(?:fold|merge|absorb|squash|bake|fusion)_?(?:in_?)?(?:bn|batch_?norm|conv|norm|branch))"
    r"|(?i:(?:bn|batch_?norm|conv|norm|branch)\w*_(?:fold|merge|absorb|squash|bake|fusion))"
)
#: how far from the reader the function may be that folds
_DEPTH = 3  # further out FX traces on behalf of somebody who fuses


@functools.lru_cache(maxsize=4096)
def _folds(code: CodeType) -> bool:
    # A test that is named after folding reads filters to look at them.
    return _FOLDS.search(code.co_name) is not None and not code.co_name.startswith("test")


@functools.lru_cache(maxsize=4096)
def _ours(code: CodeType) -> bool:
    return code.co_filename.startswith(_HERE)


def refuse_folding(kind: str) -> None:
    """Raise where the function that reads the filters of a layer of class ``kind`` is one that folds convolutions.

    ``weight`` of an operator is what its convolution's was, but what it computes is another function of it: a
    BatchNorm's gain, another branch or an identity cannot be added to it. Code that does so has no other way to know.
    Told by the names of the nearest functions outside this package.

    Raises:
        ConversionError: with what to do instead.
    """
    if torch.compiler.is_compiling():  # there are no frames to look at
        return
    frame = sys._getframe(2)
    for _ in range(_DEPTH):
        code = frame.f_code
        if _ours(code):
            return
        if _folds(code):
            where = f"{os.path.basename(os.path.dirname(code.co_filename))}/{os.path.basename(code.co_filename)}"
            raise ConversionError(
                f"{code.co_name} ({where}) folds the filters of a convolution, and this layer is a {kind}: the same "
                f"arithmetic on its filters gives another function. {WAY_OUT}"
            )
        if frame.f_back is None:
            return
        frame = frame.f_back
