# SPDX-License-Identifier: Apache-2.0
"""Measurements of a model, made once and offline, that policies read as files."""
