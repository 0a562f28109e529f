# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Verb the thing
#
# One sentence of promise.
#
# **What you'll build.** One product.
#
# **What you'll learn**
#
# - **Verb** first; three to five payoffs
#
# **What you'll need.** Prior weeks, minutes, GPU memory.

# %% tags=["parameters"]
PROFILE = "auto"  # @param ["auto", "tiny", "colab", "full"]
SEED = 0  # @param {type: "integer"}

# %% [markdown]
# ## 1. The question, before the code that answers it
#
# What do you expect? Guess first.

# %%
from course_lib.checks import record
from course_lib.hardware import quiet_libraries
from course_lib.profiles import make_plan

LESSON = "weekNN/NN_topic"
quiet_libraries()
plan = make_plan(LESSON, PROFILE)
record("profile", plan.profile)
record("device", plan.hardware.name)
plan

# %% [markdown]
# One sentence that reads the result.
#
# ### Exercise 1.1: what it asks
#
# *2 points · 5 minutes · easy.* The task in a sentence or two.
#
# <details><summary>Hint</summary>
#
# One step on the way.
#
# </details>


# %%
# Exercise 1.1
def double(number: float) -> float:
    """Return twice the number."""
    ### BEGIN SOLUTION
    return 2 * number
    ### END SOLUTION


# %%
# Check 1.1
from course_lib.checks import check

with check("1.1", points=2):
    assert double(3) == 6, "twice three is six; did you square it?"

# %% tags=["probe"]
# Probe 1.1
publish([double(rng.uniform(-10, 10)) for _ in range(5)])

# %% [markdown]
# ## Summary
#
# - What to keep.

# %%
from course_lib.checks import report

report()

# %% [markdown]
# ## In practice
#
# - Fine print.
#
# ## References
#
# - Full entries of what was cited.
#
# ## Going further
#
# What is true and interesting but beside the path.
