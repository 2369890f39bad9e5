"""The presets with one set of numbers each, and the oracles with the same."""

import functools

import jax
import numpy as np

import family_reference as family
import lwsam_jax as lwsam
from family_runs import flat_norm, GRADIENT, KERNELS, LOSSES, MODULES, train


# One set of numbers for each preset: for the library and for the oracle.
HYPER = {
    "sam": {"rho": 0.3},
    "generalized_sam": {"rho": 0.3, "alpha": 0.7},
    "asam": {"rho": 0.5, "eta": 0.05},
    "sam_on": {"rho": 0.4},
    "gsam": {"rho": 0.3, "alpha": 0.6},
    "looksam": {"rho": 0.3, "period": 3, "weight": 0.7},
    "friendly_sam": {"rho": 0.3, "sigma": 0.9, "decay": 0.6},
    "esam": {"rho": 0.2, "keep": 0.6, "samples": 0.5},
}


def method(name, **changes):
    return getattr(lwsam, name)(**{**HYPER[name], **changes})


def rule_of(name, kept=None, **changes):
    """The oracle of a preset; ESAM's is told what each step perturbed."""
    hyper = {**HYPER[name], **changes}
    if name == "esam":
        return family.esam(GRADIENT, LOSSES, **hyper, kept=kept)
    if name == "sam_on":
        hyper["leaves"] = MODULES["m_mid"]
    if name == "asam":  # T is 1 for biases, as in the authors' code
        hyper["scaled_leaves"] = KERNELS
    return getattr(family, name)(GRADIENT, **hyper)


@functools.cache
def trained(name):
    return train(method(name))


def unscaled(w, epsilon, eta):
    """The norm of T^-1 eps."""
    return flat_norm(jax.tree.map(lambda e, w: e / (np.abs(w) + eta), epsilon, w))


def composed(ascent, shape, **options):
    return family.perturbed(GRADIENT, ascent, shape, **options)
