"""What `weight_decay` means in the optimisers that Hugging Face and timm offer by name.

timm's table was measured: each optimiser of timm 1.0.31 took two steps on random gradients, with and without decay and at two
learning rates, and the difference is lr*lambda*w (decoupled), lr^2/lr_max*lambda*w (corrected), or neither; those that need a GPU
(bnb*, fused*) follow their names. What is in no table is "not known", which is what a user is told.
"""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


TIMM_DECOUPLED = _names(
    "adamw adamwlegacy nadamw radamw sgdw nesterovw lion muon nmuon adamuon nadamuon adafactor adafactorbv adabelief "
    "radabelief adan adanw adoptw kronw lambw laprop mars novogradw rmsproptfw "
    "cadamw cnadamw csgdw clion cmars cadafactor cadafactorbv cadan cadanw cadoptw claprop "
    "bnbadamw bnbadamw8bit fusedadamw"
)
# a c at the end does not suffice: lambc and nlarc clip a trust ratio
TIMM_CORRECTED = _names(
    "adamc nadamc sgdc adoptc kronc lionc lapropc rmsproptfc novogradc adafactorbvc lambcd "
    "cadamc cadoptc cnadamc csgdc clionc cadafactorbvc"
)
TIMM_SGD = _names("sgd nesterov momentum bnbsgd bnbsgd8bit fusedsgd")
COUPLED_ADAPTIVE = _names(
    "adam nadam nadamlegacy radam adamax adagrad adadelta rmsprop rmsproptf crmsproptf adopt cadopt bnbadam bnbadam8bit "
    "fusedadam"
)
HUGGING_FACE_DECOUPLED = _names(
    "adamw_torch adamw_torch_fused adamw_torch_xla adamw_torch_npu_fused adamw_torch_4bit adamw_torch_8bit adamw_hf "
    "adamw_apex_fused adamw_anyprecision adamw_bnb_8bit adamw_8bit paged_adamw_32bit paged_adamw_8bit paged_adamw "
    "lion_32bit lion_8bit paged_lion_32bit paged_lion_8bit adafactor"
)


def of_timm(optimizer: str) -> str:
    """The convention ("sgd", "decoupled", "corrected") of a timm optimiser; a ValueError says why there is none."""
    name = optimizer.lower()
    if name in TIMM_CORRECTED:
        return "corrected"
    return _known(optimizer, name, TIMM_DECOUPLED, TIMM_SGD)


def of_hugging_face(optimizer: str) -> str:
    """The convention ("sgd", "decoupled") of a Trainer's `optim`; a ValueError says why there is none."""
    return _known(optimizer, optimizer.lower(), HUGGING_FACE_DECOUPLED, frozenset({"sgd"}))


def of_option(optimizer: str) -> str:
    """The convention of torch's "sgd" and "adamw"."""
    return "sgd" if optimizer == "sgd" else "decoupled"


def _known(optimizer: str, name: str, decoupled: frozenset[str], sgd: frozenset[str]) -> str:
    if name in decoupled:
        return "decoupled"
    if name in sgd:
        return "sgd"
    if name in COUPLED_ADAPTIVE:
        raise ValueError(
            f"{optimizer} couples weight decay into an adaptive step: the decay of each weight depends on its gradients, so the "
            "recipe has no e-folds. Use the decoupled form (adamw and the like)"
        )
    raise ValueError(
        f"what weight_decay means in {optimizer!r} is not known here; if its documentation says, give --convention sgd, "
        "decoupled, relative or corrected"
    )
