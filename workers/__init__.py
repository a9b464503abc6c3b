"""The workers: everything that knows torch and Celery; they depend on dicom_node, never the reverse."""
