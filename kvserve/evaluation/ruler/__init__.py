# SPDX-License-Identifier: Apache-2.0
"""Tasks in the manner of RULER (arXiv 2404.06654, section 3).

Their forms and sizes are RULER's; the prose is a novel instead of essays, passages,
names and words are our own, and no word is in what head profiles are measured with.
"""
