"""The commands that run the lab's experiments, as cards and results name them."""

STUDIES = ("vit-fashion-mnist", "gpt-stdlib", "gpt-mvue", "gpt-fp8", "dino-fashion-mnist")
"""Names of the experiments, as `semisparse-lab experiment` takes them."""


def command(study: str, *variants: str) -> str:
    """The command that runs a study with the options called variants."""
    return " ".join([f"semisparse-lab experiment {study}", *(f"--{variant}" for variant in variants)])


def command_of(name: str) -> str | None:
    """The command that makes the results of an experiment, None for one that is not of the lab.

    Args:
        name: Of the experiment: one of STUDIES, then the options that make a variant, as in "vit-fashion-mnist-held".
    """
    for study in STUDIES:
        if name == study or name.startswith(f"{study}-"):
            return command(study, *name.removeprefix(study).split("-")[1:])
    return None
