"""For authors, CI and instructors: build the notebooks and run them. course_lib never imports this."""
