//! Mutual TLS between proxies: which configuration each side uses, and who is believed.
//!
//! Owns verification: a chain to the CA, and for the server a SPIFFE identity that is the expected one. Names and addresses
//! in certificates count for nothing.

use std::io;
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{
    ClientConfig, DigitallySignedStruct, Error, RootCertStore, ServerConfig, SignatureScheme,
};
use webpki::{EndEntityCert, ExtendedKeyUsageValidator, KeyUsage};

use crate::identity::{Credentials, SpiffeId};

const ALPN: &[u8] = b"h2";

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// How a pod calls a peer of which it expects `peer` as identity.
///
/// # Errors
/// When the pod's own certificate is unusable.
pub fn client(own: &Credentials, peer: SpiffeId) -> Result<ClientConfig, Error> {
    let verifier = ExpectIdentity {
        roots: own.roots.clone(),
        peer,
        provider: provider(),
    };
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_auth_cert(vec![own.certificate.clone()], own.key.clone_key())?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.enable_sni = false;
    // A resumed session would not show its certificate again.
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// How a pod answers: any client with a certificate of the same CA. Its identity is read with [`peer_identity`].
///
/// # Errors
/// When the pod's own certificate is unusable.
pub fn server(own: &Credentials) -> anyhow::Result<ServerConfig> {
    let clients =
        WebPkiClientVerifier::builder_with_provider(Arc::new(own.roots.clone()), provider())
            .build()?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(clients)
        .with_single_cert(vec![own.certificate.clone()], own.key.clone_key())?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// The SPIFFE identity in a verified peer's certificate.
///
/// # Errors
/// When there is no certificate or no such identity in it.
pub fn peer_identity(certificates: Option<&[CertificateDer<'_>]>) -> io::Result<SpiffeId> {
    let missing = |what| io::Error::new(io::ErrorKind::PermissionDenied, what);
    let certificate = certificates
        .and_then(<[_]>::first)
        .ok_or_else(|| missing("the peer has shown no certificate"))?;
    let certificate = EndEntityCert::try_from(certificate)
        .map_err(|_| missing("the peer's certificate is unreadable"))?;
    identities(&certificate)
        .next()
        .ok_or_else(|| missing("the peer's certificate has no SPIFFE identity"))
}

/// Checks that a certificate is a server's and was issued by one of the roots.
///
/// # Errors
/// When it was not, or is not valid now.
pub fn verify_chain(
    roots: &RootCertStore,
    certificate: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
) -> Result<(), Error> {
    chain(
        roots,
        certificate,
        intermediates,
        UnixTime::now(),
        KeyUsage::server_auth(),
    )
    .map(drop)
}

fn chain<'a>(
    roots: &RootCertStore,
    certificate: &'a CertificateDer<'a>,
    intermediates: &[CertificateDer<'_>],
    now: UnixTime,
    usage: impl ExtendedKeyUsageValidator,
) -> Result<EndEntityCert<'a>, Error> {
    let bad = |error: webpki::Error| {
        Error::General(format!("the peer's certificate is not acceptable: {error}"))
    };
    let certificate = EndEntityCert::try_from(certificate).map_err(bad)?;
    let algorithms = ring::default_provider()
        .signature_verification_algorithms
        .all;
    certificate
        .verify_for_usage(
            algorithms,
            &roots.roots,
            intermediates,
            now,
            usage,
            None,
            None,
        )
        .map_err(bad)?;
    Ok(certificate)
}

fn identities(certificate: &EndEntityCert<'_>) -> impl Iterator<Item = SpiffeId> {
    certificate
        .valid_uri_names()
        .filter_map(|uri| uri.parse().ok())
}

/// Believes exactly one identity.
#[derive(Debug)]
struct ExpectIdentity {
    roots: RootCertStore,
    peer: SpiffeId,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for ExpectIdentity {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let certificate = chain(
            &self.roots,
            end_entity,
            intermediates,
            now,
            KeyUsage::server_auth(),
        )?;
        let shown: Vec<_> = identities(&certificate).collect();
        if shown.contains(&self.peer) {
            return Ok(ServerCertVerified::assertion());
        }
        Err(Error::General(format!(
            "expected the peer to be {}, its certificate says {shown:?}",
            self.peer
        )))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::Ca;
    use crate::messages::WorkloadInfo;
    use tokio_rustls::{TlsAcceptor, TlsConnector};

    fn credentials(ca: &Ca, account: &str) -> Credentials {
        let info = WorkloadInfo {
            name: "p".into(),
            namespace: "n".into(),
            service_account: account.into(),
        };
        ca.issue(&info).unwrap()
    }

    /// Shakes hands; gives what the client says, and whom the server sees.
    async fn handshake(
        client_side: &Credentials,
        server_side: &Credentials,
        expected: &str,
    ) -> (io::Result<()>, io::Result<SpiffeId>) {
        let connector = TlsConnector::from(Arc::new(
            client(client_side, expected.parse().unwrap()).unwrap(),
        ));
        let acceptor = TlsAcceptor::from(Arc::new(server(server_side).unwrap()));
        let (near, far) = tokio::io::duplex(1 << 16);
        let name = ServerName::try_from("10.0.0.2").unwrap();
        let (near, far) = tokio::join!(connector.connect(name, near), acceptor.accept(far));
        let seen = far.and_then(|far| peer_identity(far.get_ref().1.peer_certificates()));
        (near.map(drop), seen)
    }

    #[tokio::test]
    async fn the_expected_peer_is_believed_and_the_client_is_known() {
        let ca = Ca::generate().unwrap();
        let (a, b) = (credentials(&ca, "a"), credentials(&ca, "b"));
        let (client, seen) = handshake(&a, &b, "spiffe://cluster.local/ns/n/sa/b").await;
        client.unwrap();
        assert_eq!(seen.unwrap(), a.id);
    }

    #[tokio::test]
    async fn another_identity_of_the_same_ca_is_not() {
        let ca = Ca::generate().unwrap();
        let (a, b) = (credentials(&ca, "a"), credentials(&ca, "b"));
        let (client, _) = handshake(&a, &b, "spiffe://cluster.local/ns/n/sa/c").await;
        let error = client.unwrap_err().to_string();
        assert!(
            error.contains("ns/n/sa/b") && error.contains("ns/n/sa/c"),
            "{error}"
        );
    }

    #[tokio::test]
    async fn the_right_identity_from_another_ca_is_not() {
        let (ours, theirs) = (Ca::generate().unwrap(), Ca::generate().unwrap());
        let (client, _) = handshake(
            &credentials(&ours, "a"),
            &credentials(&theirs, "b"),
            "spiffe://cluster.local/ns/n/sa/b",
        )
        .await;
        assert!(client.unwrap_err().to_string().contains("not acceptable"));
    }

    #[tokio::test]
    async fn a_client_from_another_ca_is_not_served() {
        let (ours, theirs) = (Ca::generate().unwrap(), Ca::generate().unwrap());
        let stranger = Credentials {
            roots: credentials(&ours, "x").roots,
            ..credentials(&theirs, "a")
        };
        let (_, seen) = handshake(
            &stranger,
            &credentials(&ours, "b"),
            "spiffe://cluster.local/ns/n/sa/b",
        )
        .await;
        assert!(seen.is_err());
    }
}
