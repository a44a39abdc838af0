# The reference engine. BASE needs nothing but a python3 of 3.11 or later.
ARG BASE=python:3.11-slim
FROM ${BASE}

# The root filesystem is read-only when it runs: all bytecode is made here.
ENV PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
COPY services/__init__.py services/
COPY services/engine services/engine
# A new volume takes over the owner of the directory that it is mounted on.
RUN python3 -m compileall -q services && install -d -o 10001 -g 10001 /data && install -d /catalog

USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
ENTRYPOINT ["python3", "-m", "services.engine"]
