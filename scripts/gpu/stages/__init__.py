# SPDX-License-Identifier: Apache-2.0
"""Stages of the GPU run; each is a module that ``run.py`` starts by name."""
