"""The library behind the notebooks: plans, data, models, training, evaluation, plots, widgets, checks.

Import what you need from the module that has it, as in ``from course_lib.profiles import make_plan``.
Importing does no work: no download, no seed, no logging, and no heavy package until it is used.
"""

__version__ = "0.1.0"
