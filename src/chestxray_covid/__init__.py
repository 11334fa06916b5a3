"""COVID-19 classification of chest radiographs that tells lungs from data sets.

Importing this package imports nothing else: every public name is loaded when it is first used
(PEP 562), so that neither torch nor an optional package is paid for before it is needed.

This is a research library. It is not a medical device and makes no diagnosis.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from chestxray_covid._version import __version__

if TYPE_CHECKING:  # what type checkers and editors see
    from chestxray_covid.audit import audit_shortcuts as audit_shortcuts
    from chestxray_covid.audit_figure import plot_audit as plot_audit
    from chestxray_covid.audit_report import AuditFinding as AuditFinding
    from chestxray_covid.audit_report import AuditItem as AuditItem
    from chestxray_covid.audit_report import AuditReport as AuditReport
    from chestxray_covid.augment import Augmentation as Augmentation
    from chestxray_covid.batch import PredictedFiles as PredictedFiles
    from chestxray_covid.batch import predict_files as predict_files
    from chestxray_covid.batch import ray_predict as ray_predict
    from chestxray_covid.calibration import CalibrationReport as CalibrationReport
    from chestxray_covid.calibration import calibrate as calibrate
    from chestxray_covid.calibration import fit_temperature as fit_temperature
    from chestxray_covid.checkpoint import ModelConfig as ModelConfig
    from chestxray_covid.classifier import Classifier as Classifier
    from chestxray_covid.comparison import Comparison as Comparison
    from chestxray_covid.confounders import Confounding as Confounding
    from chestxray_covid.confounders import ConfoundingWarning as ConfoundingWarning
    from chestxray_covid.confounders import confounding as confounding
    from chestxray_covid.curves import PrecisionRecallCurve as PrecisionRecallCurve
    from chestxray_covid.curves import Reliability as Reliability
    from chestxray_covid.curves import RiskCoverageCurve as RiskCoverageCurve
    from chestxray_covid.curves import RocCurve as RocCurve
    from chestxray_covid.datasets.base import ChestXrayDataset as ChestXrayDataset
    from chestxray_covid.datasets.base import Sample as Sample
    from chestxray_covid.datasets.base import concatenate as concatenate
    from chestxray_covid.datasets.cohen import CohenCovidDataset as CohenCovidDataset
    from chestxray_covid.datasets.download import download_cohen as download_cohen
    from chestxray_covid.datasets.download import download_kermany as download_kermany
    from chestxray_covid.datasets.duplicates import find_duplicates as find_duplicates
    from chestxray_covid.datasets.duplicates import patient_groups as patient_groups
    from chestxray_covid.datasets.folder import FolderDataset as FolderDataset
    from chestxray_covid.datasets.folder import HannoverCovidDataset as HannoverCovidDataset
    from chestxray_covid.datasets.folder import ManifestDataset as ManifestDataset
    from chestxray_covid.datasets.folder import open_dataset as open_dataset
    from chestxray_covid.datasets.kermany import KermanyPneumoniaDataset as KermanyPneumoniaDataset
    from chestxray_covid.datasets.report import DatasetReport as DatasetReport
    from chestxray_covid.datasets.synthetic import SyntheticChestXray as SyntheticChestXray
    from chestxray_covid.errors import ArchiveError as ArchiveError
    from chestxray_covid.errors import CheckpointError as CheckpointError
    from chestxray_covid.errors import CheckpointNotFoundError as CheckpointNotFoundError
    from chestxray_covid.errors import ChestXrayError as ChestXrayError
    from chestxray_covid.errors import ConfigError as ConfigError
    from chestxray_covid.errors import DatasetError as DatasetError
    from chestxray_covid.errors import DatasetNotFoundError as DatasetNotFoundError
    from chestxray_covid.errors import DownloadError as DownloadError
    from chestxray_covid.errors import ExportError as ExportError
    from chestxray_covid.errors import ForkedError as ForkedError
    from chestxray_covid.errors import ImageError as ImageError
    from chestxray_covid.errors import ImageNotFoundError as ImageNotFoundError
    from chestxray_covid.errors import IntegrityError as IntegrityError
    from chestxray_covid.errors import MissingExtraError as MissingExtraError
    from chestxray_covid.errors import ReportError as ReportError
    from chestxray_covid.errors import ResourceError as ResourceError
    from chestxray_covid.errors import SplitError as SplitError
    from chestxray_covid.errors import TrainingError as TrainingError
    from chestxray_covid.errors import TrainingInterrupted as TrainingInterrupted
    from chestxray_covid.errors import TrainingWarning as TrainingWarning
    from chestxray_covid.errors import WeightsUnavailableError as WeightsUnavailableError
    from chestxray_covid.evaluation import cross_validate as cross_validate
    from chestxray_covid.evaluation import evaluate as evaluate
    from chestxray_covid.evaluation_report import EvaluationReport as EvaluationReport
    from chestxray_covid.explain import grad_cam as grad_cam
    from chestxray_covid.explain import occlusion_sensitivity as occlusion_sensitivity
    from chestxray_covid.export import export_model as export_model
    from chestxray_covid.gate import Flag as Flag
    from chestxray_covid.gate import Gate as Gate
    from chestxray_covid.gate_fit import fit_gate as fit_gate
    from chestxray_covid.gate_lungs import describe_lungs as describe_lungs
    from chestxray_covid.generalisation import LeftOutSource as LeftOutSource
    from chestxray_covid.generalisation import leave_one_source_out as leave_one_source_out
    from chestxray_covid.heat_shares import LungHeat as LungHeat
    from chestxray_covid.heat_shares import lung_heat as lung_heat
    from chestxray_covid.heatmap import Heatmap as Heatmap
    from chestxray_covid.hub import bundled_models as bundled_models
    from chestxray_covid.hub import resolve as resolve
    from chestxray_covid.image import Preprocess as Preprocess
    from chestxray_covid.image import load_image as load_image
    from chestxray_covid.intervals import Estimate as Estimate
    from chestxray_covid.lungs import lung_box as lung_box
    from chestxray_covid.lungs import lung_mask as lung_mask
    from chestxray_covid.lungs import segment as segment
    from chestxray_covid.models import build_densenet121 as build_densenet121
    from chestxray_covid.models import set_trainable as set_trainable
    from chestxray_covid.operating_points import OperatingPoint as OperatingPoint
    from chestxray_covid.plots import plot_confusion as plot_confusion
    from chestxray_covid.plots import plot_heatmaps as plot_heatmaps
    from chestxray_covid.plots import plot_history as plot_history
    from chestxray_covid.plots import plot_precision_recall as plot_precision_recall
    from chestxray_covid.plots import plot_reliability as plot_reliability
    from chestxray_covid.plots import plot_risk_coverage as plot_risk_coverage
    from chestxray_covid.plots import plot_roc as plot_roc
    from chestxray_covid.plots import plot_samples as plot_samples
    from chestxray_covid.prediction import FailedPrediction as FailedPrediction
    from chestxray_covid.prediction import Prediction as Prediction
    from chestxray_covid.quantization import QuantizationReport as QuantizationReport
    from chestxray_covid.quantization import quantize as quantize
    from chestxray_covid.report import write_report as write_report
    from chestxray_covid.splits import Split as Split
    from chestxray_covid.splits import split_by_patient as split_by_patient
    from chestxray_covid.subgroups import Subgroup as Subgroup
    from chestxray_covid.training import Trainer as Trainer
    from chestxray_covid.training_config import Callback as Callback
    from chestxray_covid.training_config import TrainingConfig as TrainingConfig
    from chestxray_covid.training_history import EpochRecord as EpochRecord
    from chestxray_covid.training_history import History as History

#: Module → the public names that it defines.
_MODULES = {
    "audit": ("audit_shortcuts",),
    "audit_figure": ("plot_audit",),
    "audit_report": ("AuditFinding", "AuditItem", "AuditReport"),
    "augment": ("Augmentation",),
    "batch": ("PredictedFiles", "predict_files", "ray_predict"),
    "calibration": ("CalibrationReport", "calibrate", "fit_temperature"),
    "checkpoint": ("ModelConfig",),
    "classifier": ("Classifier",),
    "comparison": ("Comparison",),
    "confounders": ("Confounding", "ConfoundingWarning", "confounding"),
    "curves": ("PrecisionRecallCurve", "Reliability", "RiskCoverageCurve", "RocCurve"),
    "datasets.base": ("ChestXrayDataset", "Sample", "concatenate"),
    "datasets.cohen": ("CohenCovidDataset",),
    "datasets.download": ("download_cohen", "download_kermany"),
    "datasets.duplicates": ("find_duplicates", "patient_groups"),
    "datasets.folder": (
        "FolderDataset",
        "HannoverCovidDataset",
        "ManifestDataset",
        "open_dataset",
    ),
    "datasets.kermany": ("KermanyPneumoniaDataset",),
    "datasets.report": ("DatasetReport",),
    "datasets.synthetic": ("SyntheticChestXray",),
    "errors": (
        "ArchiveError",
        "CheckpointError",
        "CheckpointNotFoundError",
        "ChestXrayError",
        "ConfigError",
        "DatasetError",
        "DatasetNotFoundError",
        "DownloadError",
        "ExportError",
        "ForkedError",
        "ImageError",
        "ImageNotFoundError",
        "IntegrityError",
        "MissingExtraError",
        "ReportError",
        "ResourceError",
        "SplitError",
        "TrainingError",
        "TrainingInterrupted",
        "TrainingWarning",
        "WeightsUnavailableError",
    ),
    "evaluation": ("cross_validate", "evaluate"),
    "evaluation_report": ("EvaluationReport",),
    "explain": ("grad_cam", "occlusion_sensitivity"),
    "export": ("export_model",),
    "gate": ("Flag", "Gate"),
    "gate_fit": ("fit_gate",),
    "gate_lungs": ("describe_lungs",),
    "heatmap": ("Heatmap",),
    "generalisation": ("LeftOutSource", "leave_one_source_out"),
    "hub": ("bundled_models", "resolve"),
    "image": ("Preprocess", "load_image"),
    "heat_shares": ("LungHeat", "lung_heat"),
    "intervals": ("Estimate",),
    "lungs": ("lung_box", "lung_mask", "segment"),
    "models": ("build_densenet121", "set_trainable"),
    "operating_points": ("OperatingPoint",),
    "plots": (
        "plot_confusion",
        "plot_heatmaps",
        "plot_history",
        "plot_precision_recall",
        "plot_reliability",
        "plot_risk_coverage",
        "plot_roc",
        "plot_samples",
    ),
    "prediction": ("FailedPrediction", "Prediction"),
    "report": ("write_report",),
    "quantization": ("QuantizationReport", "quantize"),
    "splits": ("Split", "split_by_patient"),
    "subgroups": ("Subgroup",),
    "training": ("Trainer",),
    "training_config": ("Callback", "TrainingConfig"),
    "training_history": ("EpochRecord", "History"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
