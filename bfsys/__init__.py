"""bfsys trains classifiers on raw file bytes, from a laptop to a SLURM cluster.

    import bfsys

    run = bfsys.fit("photos", minutes=10)            # a folder of files per class: trained and evaluated
    model = bfsys.load("runs/quickstart")
    model.predict("photo.jpg")                       # the likeliest classes of one file
    model.predict(bfsys.files_in("photos"), top=1)   # the likeliest class of many
    model.explain("photo.jpg").summary()             # which bytes decide its class
    model.probabilities([b"…", b"…"])                # [2, classes]

The docstrings of `fit`, `load` and `Model` have the rest. Bad input raises `UserError`. All other names are internal
and may change.
"""

__version__ = "0.1.0"  # setup.cfg reads it; a copy of the code, as jobs use, has no metadata of an installation

TYPE_CHECKING = False  # type checkers assume True; while `typing` is imported, Ctrl-C would show a traceback
if TYPE_CHECKING:
    from bfsys.answers import Prediction
    from bfsys.errors import UserError
    from bfsys.explain.explanation import Explanation
    from bfsys.fitting.from_python import fit
    from bfsys.inputs import files_in
    from bfsys.predict import Model, load

__all__ = ["Explanation", "Model", "Prediction", "UserError", "files_in", "fit", "load"]

# A name is imported when it is first used, so `bfsys --help` does not import PyTorch.
_MODULES = {
    "Explanation": "bfsys.explain.explanation",
    "Model": "bfsys.predict",
    "Prediction": "bfsys.answers",
    "UserError": "bfsys.errors",
    "files_in": "bfsys.inputs",
    "fit": "bfsys.fitting.from_python",
    "load": "bfsys.predict",
}


if not TYPE_CHECKING:  # with `__getattr__`, a type checker would accept any name

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module 'bfsys' has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
