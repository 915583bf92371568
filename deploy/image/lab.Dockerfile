# The single-user image with JupyterLab, for people. Tests need only kernels.
ARG BASE
FROM ${BASE}
USER root
COPY requirements.txt ca.crt /tmp/
RUN PIP_CERT=/tmp/ca.crt /opt/jupyter/bin/pip install --no-cache-dir -q -r /tmp/requirements.txt \
 && rm -f /tmp/requirements.txt /tmp/ca.crt
USER jovyan
