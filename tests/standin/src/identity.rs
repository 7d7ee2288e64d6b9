//! Identities: the test CA, and the certificate each pod gets when it is added.
//!
//! Owns keys and certificates. Who is believed, and for what, is said in `tls`.

use std::fmt;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::str::FromStr;

use anyhow::Context as _;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::messages::WorkloadInfo;

/// ztunnel's default trust domain.
const TRUST_DOMAIN: &str = "cluster.local";
const CERT_FILE: &str = "ca.pem";
const KEY_FILE: &str = "ca-key.pem";

/// A workload's name in the mesh: `spiffe://DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SpiffeId(String);

impl SpiffeId {
    /// The identity of a pod, by its service account.
    #[must_use]
    pub fn of(info: &WorkloadInfo) -> Self {
        Self(format!(
            "spiffe://{TRUST_DOMAIN}/ns/{}/sa/{}",
            info.namespace, info.service_account
        ))
    }

    /// The URI.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for SpiffeId {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let path = text
            .strip_prefix("spiffe://")
            .and_then(|rest| rest.split_once('/'));
        match path {
            Some((domain, path)) if !domain.is_empty() && !path.is_empty() => {
                Ok(Self(text.to_owned()))
            }
            _ => anyhow::bail!(
                "{text} is not a SPIFFE identity: expected spiffe://DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT"
            ),
        }
    }
}

impl<'de> serde::Deserialize<'de> for SpiffeId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// A certificate authority for tests; whoever shares it trusts one another.
pub struct Ca {
    issuer: Issuer<'static, KeyPair>,
    /// As it is written to a file.
    pem: String,
    certificate: CertificateDer<'static>,
}

impl fmt::Debug for Ca {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ca").finish_non_exhaustive()
    }
}

/// What a pod proves its identity with.
#[derive(Debug)]
pub struct Credentials {
    /// The identity in the certificate.
    pub id: SpiffeId,
    /// The certificate.
    pub certificate: CertificateDer<'static>,
    /// Its key.
    pub key: PrivateKeyDer<'static>,
    /// Whom to believe.
    pub roots: RootCertStore,
}

impl Ca {
    /// A new authority that nobody else knows.
    ///
    /// # Errors
    /// When no key can be made.
    pub fn generate() -> anyhow::Result<Self> {
        let key = KeyPair::generate()?;
        let certificate = ca_params().self_signed(&key)?;
        Ok(Self {
            issuer: Issuer::new(ca_params(), key),
            pem: certificate.pem(),
            certificate: certificate.der().clone(),
        })
    }

    /// Writes certificate and key to a directory, made if needed; an authority that is there already is replaced.
    ///
    /// # Errors
    /// When the directory cannot be written.
    pub fn write(&self, dir: &Path) -> anyhow::Result<()> {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let key = self.issuer.key().serialize_pem();
        for (name, text, mode) in [(KEY_FILE, &key, 0o600), (CERT_FILE, &self.pem, 0o644)] {
            let path = dir.join(name);
            let mut options = std::fs::OpenOptions::new();
            let file = options
                .write(true)
                .create(true)
                .truncate(true)
                .mode(mode)
                .open(&path);
            file.and_then(|mut file| std::io::Write::write_all(&mut file, text.as_bytes()))
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }

    /// Reads what [`Ca::write`] wrote.
    ///
    /// # Errors
    /// When a file is missing, or the certificate is not one of this program's for this key.
    pub fn load(dir: &Path) -> anyhow::Result<Self> {
        let cure = || {
            format!(
                "no usable CA in {0}: run `ztunnel-standin gen-ca --dir {0}`",
                dir.display()
            )
        };
        let key = std::fs::read_to_string(dir.join(KEY_FILE)).with_context(cure)?;
        let key = KeyPair::from_pem(&key).with_context(cure)?;
        let pem = std::fs::read_to_string(dir.join(CERT_FILE)).with_context(cure)?;
        let certificate = CertificateDer::from_pem_slice(pem.as_bytes()).with_context(cure)?;
        let ca = Self {
            issuer: Issuer::new(ca_params(), key),
            pem,
            certificate,
        };
        // The name and key of the issuer are assumed, so try whether the certificate agrees.
        let probe = ca.issue(&WorkloadInfo::default()).with_context(cure)?;
        crate::tls::verify_chain(&probe.roots, &probe.certificate, &[]).with_context(cure)?;
        Ok(ca)
    }

    /// Mints a pod's certificate.
    ///
    /// # Errors
    /// When the pod's names do not fit into a certificate.
    pub fn issue(&self, info: &WorkloadInfo) -> anyhow::Result<Credentials> {
        let id = SpiffeId::of(info);
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(id.as_str().try_into()?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &self.issuer)?.der().clone();
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.clone())?;
        let key = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
        Ok(Credentials {
            id,
            certificate,
            key,
            roots,
        })
    }
}

fn ca_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
        .distinguished_name
        .push(DnType::CommonName, "ztunnel-standin test CA");
    params
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info() -> WorkloadInfo {
        WorkloadInfo {
            name: "web-1".into(),
            namespace: "shop".into(),
            service_account: "web".into(),
        }
    }

    #[test]
    fn identity_follows_the_service_account() {
        assert_eq!(
            SpiffeId::of(&info()).as_str(),
            "spiffe://cluster.local/ns/shop/sa/web"
        );
        for bad in [
            "",
            "cluster.local/ns/a/sa/b",
            "spiffe://",
            "spiffe:///ns",
            "spiffe://x/",
        ] {
            assert!(bad.parse::<SpiffeId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn written_and_loaded_authorities_are_the_same() {
        let dir = std::env::temp_dir().join(format!("standin-ca-{}", std::process::id()));
        let ca = Ca::generate().unwrap();
        ca.write(&dir).unwrap();
        let loaded = Ca::load(&dir).unwrap();
        let leaf = loaded.issue(&info()).unwrap();
        let roots = ca.issue(&info()).unwrap().roots;
        crate::tls::verify_chain(&roots, &leaf.certificate, &[]).unwrap();

        // A certificate of another authority beside this key must be noticed at once.
        let other = Ca::generate().unwrap();
        std::fs::write(dir.join(CERT_FILE), other.pem).unwrap();
        let error = format!("{:#}", Ca::load(&dir).unwrap_err());
        assert!(error.contains("gen-ca"), "{error}");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
