# SPDX-License-Identifier: Apache-2.0
"""Measurements behind every published number; ``python -m benchmarks.NAME --help``."""
