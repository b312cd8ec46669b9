# SPDX-License-Identifier: Apache-2.0
"""Texts with hidden facts, for evaluation, profiling and load."""
