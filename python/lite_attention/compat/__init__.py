"""Others' calls, exactly as their packages have them, so that their users can switch.

Layouts, names and defaults of others live here alone: each call turns its arguments into those of a native one
(:mod:`lite_attention.families`), whose errors it passes on; they speak of ``[B, S, H, D]`` and of the native names.
"""
