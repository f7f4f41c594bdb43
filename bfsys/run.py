"""What must hold before the first step: data that fit the config, and a run directory that holds this run or none."""

from __future__ import annotations

import subprocess
from importlib.metadata import version
from pathlib import Path

from bfsys import dist, typed_yaml
from bfsys.checkpoint.loading import check_same_run, newest_readable
from bfsys.config import Config
from bfsys.data.datasets import Sources, content_facts, index_problems, make_plan, open_evaluation, open_training
from bfsys.data.plan import Plan, lanes_of_rank
from bfsys.errors import UserError
from bfsys.evaluate import short_files
from bfsys.faults import forget_end


def open_data(config: Config, ranks: dist.Ranks) -> tuple[Sources, Sources | None, Plan]:
    """Training sources, validation sources (None if no source has that split) and the plan."""
    training = open_training(config)
    validation = open_evaluation(config, config.data.eval_split, training.classes)
    lanes_of_rank(config.data.lanes, ranks.rank, ranks.world_size)
    problems = [p for part in (training, validation) for p in short_files(config, part)]
    problems += [p for part in (training, validation) for p in index_problems(part, ranks.rank, ranks.world_size)]
    if problems:
        raise UserError(*problems)
    return training, validation if validation.splits else None, make_plan(config, training)


def run_facts(config: Config, training: Sources, plan: Plan) -> dict:
    """What makes a checkpoint self-contained, and what a resume must agree with."""
    return {
        "classes": list(training.classes),
        "plan": {**plan.facts, **content_facts(config, training)},
        "config": typed_yaml.to_tree(config),
        "versions": {name: version(name) for name in ("bfsys", "torch", "deepspeed")} | {"git": git_state()},
    }


def git_state() -> str | None:
    """The commit of this code, with a + if files were changed since; None if it is no repository."""
    here = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != here:
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def prepare_run_dir(config: Config, facts: dict, ranks: dist.Ranks) -> bool:
    """Whether the run is new, decided by rank 0. Raises AgreedError if the directory holds another run.

    Writes the run directory's config.yaml.
    """

    def look() -> bool:
        if not ranks.is_first:
            return False
        path, problems = newest_readable(config.run_dir)
        if path is None and problems:
            raise UserError(
                *problems,
                f"{config.run_dir}: no checkpoint is whole, see above; to begin anew, give another name=… "
                f"or move the directory away",
            )
        if path:
            check_same_run(path, facts)
        try:
            config.run_dir.mkdir(parents=True, exist_ok=True)
            (config.run_dir / "config.yaml").write_text(typed_yaml.dump(config))
            forget_end(config.run_dir)
        except OSError as error:
            raise UserError(f"run directory {config.run_dir}: cannot be written: {error.strerror}") from None
        return path is None

    return dist.from_first_rank(dist.same_errors_on_all(look))
