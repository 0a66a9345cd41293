"""The configuration: its tree and presets, files, command line, and the networks it describes."""

from pipeline.config.tree import PRESETS, Bounds, Config, LogConfig, LossConfig, ModelConfig, Precision, preset

__all__ = ["PRESETS", "Bounds", "Config", "LogConfig", "LossConfig", "ModelConfig", "Precision", "preset"]
