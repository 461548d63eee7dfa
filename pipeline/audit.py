"""Entry point: compare each loss with the reference as a function, in seconds and without training.

python -m pipeline.audit 'loss=[ce,nll,kl,kl_mean]' 'expect={nll: same, kl: same, kl_mean: scaled}'
"""

from __future__ import annotations

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from pipeline.config import schema as conf
from pipeline.config.hydra_glue import folder_of, run_entry_point
from pipeline.config.validate import validate_audit
from pipeline.entry import ExitCode, gc_paused_import, record_exit_code, run_and_report


@hydra.main(version_base="1.3", config_path=str(conf.CONF), config_name="audit")
def task(cfg: DictConfig) -> None:
    """Run one audit and store its exit code."""
    record_exit_code(run_and_report(lambda: _audit(cfg)))


def _audit(cfg: DictConfig) -> ExitCode:
    with gc_paused_import("torch"):
        validate_audit(cfg)
        from pipeline.loss_audit.command import run

    return run(conf.plain(cfg), folder_of(HydraConfig.get()))


def main() -> None:
    """Console script."""
    run_entry_point(task)


if __name__ == "__main__":
    main()
