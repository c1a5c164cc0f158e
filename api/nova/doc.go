package nova
